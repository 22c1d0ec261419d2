"""What a quantization will take, before it begins: bytes, memory, disk, time."""
