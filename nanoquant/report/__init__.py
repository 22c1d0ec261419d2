"""The command ``nanoquant report``: one self-contained page, and its plots as PNGs, from what a run recorded."""
