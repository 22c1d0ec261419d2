"""Ablations: the same model quantized under many settings, resumably, with a table and plots."""
