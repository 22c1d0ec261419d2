"""Checkpoints of other programs that hold the same factors: read to the last sign, and written."""
