"""What settings are worth: a model quantized under every combination that a YAML lists, with a table and plots.

    python recipes/ablate.py recipes/ablate_phases.yaml runs/phases                  the demo model
    python recipes/ablate.py recipes/ablate_settings.yaml runs/all --model MODEL --set run.accelerator=gpu

Each cell leaves one file in OUT/cells. The same command again runs only what is missing or has failed. The YAML is
explained in nanoquant/ablation/plan.py; paths in it count from the folder where the command is run.
"""

import argparse
import sys
from pathlib import Path

from get_model import get_model

from nanoquant.console import note, quiet, say, show_logs


def ablate(arguments):
    from nanoquant.ablation.cells import run_plan
    from nanoquant.ablation.plan import read_plan
    from nanoquant.ablation.plots import can_plot, write_plots
    from nanoquant.ablation.table import markdown, rows, write_csv

    changes = dict(change.split("=", 1) for change in arguments.set)
    plan = read_plan(arguments.plan, arguments.model or str(get_model()), changes)
    folder = Path(arguments.output)
    note(f"{len(plan.cells)} cells, in {folder}")
    records = run_plan(plan, folder)
    found = rows(records)
    write_csv(folder / "cells.csv", records)
    (folder / "table.md").write_text(markdown(found), encoding="utf-8")
    say(markdown(found).rstrip())
    if can_plot():
        write_plots(folder, found, records)
    else:
        note("no plots: matplotlib is not installed; pip install 'nanoquant[plots]'")
    return sum(record["status"] != "finished" for record in records)


def change(text):
    if "=" not in text:
        raise argparse.ArgumentTypeError(f"{text!r} must look like budget.bits=0.8")
    return text


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("plan", help="YAML file with base, mode and axes")
    parser.add_argument("output", help="folder for cells, table and plots")
    parser.add_argument("--model", help="folder or Hub name; the demo model by default")
    parser.add_argument(
        "--set", type=change, action="append", default=[], metavar="FLAG=VALUE",
        help="replace a flag of the base; may be given several times",
    )  # fmt: skip
    quiet()
    show_logs(verbose=False)
    try:
        sys.exit(1 if ablate(parser.parse_args()) else 0)
    except ValueError as error:
        sys.exit(f"ablate.py: error: {error}")


if __name__ == "__main__":
    main()
