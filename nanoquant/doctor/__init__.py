"""nanoquant doctor: what would stop a quantization, found before it begins."""
