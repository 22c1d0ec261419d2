"""Other ways to quantize the same linears, measured in true bits beside ours; by the libraries that own them."""
