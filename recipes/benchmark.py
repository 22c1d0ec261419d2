"""Packed linears and models against bf16 on this machine: tables, every figure as JSON, and a roofline plot.

    python recipes/benchmark.py                            all published models, hours on a CPU
    python recipes/benchmark.py --model demo --tokens 1    about two minutes on 2 cores
    python recipes/benchmark.py --config-only llama-2-70b --layers 2 --tokens 1

Any flag of "nanoquant bench" works. The plot is drawn where matplotlib is installed. A run that is stopped leaves what
it had measured in runs/; --show prints it.
"""

import argparse
import importlib.util
import sys
from datetime import datetime

from get_model import ROOT

from nanoquant.cli import main

RUNS = ROOT / "runs"


def benchmark(arguments: list[str]) -> int:
    """Run the command with files for figures and plot in runs/, named by the time."""
    RUNS.mkdir(exist_ok=True)
    name = RUNS / f"bench-{datetime.now():%Y%m%d-%H%M%S}"
    flags = ["--json", f"{name}.json"]
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--config-only", "--config_only")
    parser.add_argument("--parts", default="shapes")
    parser.add_argument("--show")
    known, _ = parser.parse_known_args(arguments)
    if known.show is not None:
        return main(["bench", *arguments])
    shapes = "shapes" in known.parts and known.config_only is None
    if shapes and importlib.util.find_spec("matplotlib") is not None:
        flags += ["--plot", f"{name}.png"]
    return main(["bench", *flags, *arguments])


if __name__ == "__main__":
    sys.exit(benchmark(sys.argv[1:]))
