"""``python -m nanoquant`` is the command line."""

from nanoquant.cli import run

run()
