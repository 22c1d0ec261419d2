"""The main job on the demo model: quantize, save, load in a fresh process, print one table.

python recipes/demo.py                                 about 20 minutes on 2 cores
python recipes/demo.py --preset balanced --bits 0.8    any flag of "nanoquant quantize" works
python recipes/demo.py --get gemma-3-270m              another model that recipes/get_model.py knows
nanoquant report runs/demo-fast-1.0-bit --output tutorials/demo    page and PNGs of what the first of them recorded
"""

import argparse
import sys
from pathlib import Path

from get_model import DEMO, PACKAGES, ROOT, get_model

from nanoquant.cli import main
from nanoquant.console import quiet

YAML = ROOT / "recipes" / "quantize_demo.yaml"
RUNS = ROOT / "runs"


def fresh_folder(name: str) -> Path:
    """A folder in runs/ that does not exist yet: name, name-2, name-3, ..."""
    RUNS.mkdir(exist_ok=True)
    number = 1
    while (folder := RUNS / (name if number == 1 else f"{name}-{number}")).exists():
        number += 1
    return folder


def demo(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--preset", default="fast")
    parser.add_argument("--bits", default="1.0")
    parser.add_argument("--get", default=DEMO, choices=PACKAGES)
    known, rest = parser.parse_known_args(arguments)
    quiet()
    name = "demo" if known.get == DEMO else known.get
    output = fresh_folder(f"{name}-{known.preset}-{known.bits}-bit")
    flags = ["--config", str(YAML), "--json", f"{output}.json"]
    choice = ["--preset", known.preset, "--bits", known.bits]
    return main(["quantize", str(get_model(known.get)), str(output), *flags, *choice, *rest])


if __name__ == "__main__":
    sys.exit(demo(sys.argv[1:]))
