"""Packed checkpoints behind servers that others keep; no server of our own."""
