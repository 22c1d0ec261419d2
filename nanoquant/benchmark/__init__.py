"""The command ``nanoquant bench``: packed linears and whole models against bf16 on this machine."""
