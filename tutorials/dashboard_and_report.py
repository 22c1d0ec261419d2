"""Read what a run recorded: its files, the panels of a dashboard, the plots of the report.

    python tutorials/dashboard_and_report.py
    python tutorials/dashboard_and_report.py report      keeps the page and its PNGs in this folder

`nanoquant quantize MODEL OUT` leaves `OUT.run` beside the checkpoint: run.json with settings, versions, status, seconds
and final figures, metrics.jsonl with a line for everything that was measured on the way. With `--logger wandb` or
`--logger tensorboard` the same figures go to a dashboard while the run works; here the files suffice.
"""

import importlib.util
import sys
import tempfile
from collections import defaultdict
from pathlib import Path

from small_model import TRAIN, small_model

from nanoquant.cli import main as nanoquant
from nanoquant.report.run_files import find_run, read_run
from nanoquant.tracking.layout import LAYER_COLUMNS, Layout

FLAGS = (
    "--bits 1.5 --budget.rank_multiple 8 --calibration.windows 16 --calibration.length 64 --verify false "
    "--block.windows 16 --block.schedule algorithm1 --block.refine_epochs 4 --block.refine_batch 8 "
    "--block.relative_rates true --block.latent_lr 3e-3 --block.scale_lr 3e-3 "
    "--model.windows 128 --model.batch 8 --model.held_out 8 --model.compile_from null"
)


def show_dashboard(run):
    """The series that a dashboard draws, each with its first and last value; a panel for each name before the slash."""
    layout, series = Layout(), defaultdict(list)
    for record in run.rows:
        for point in layout.points(record):
            for name, value in point.values.items():
                series[name].append(value)
    for point in layout.after_model():
        for name, value in point.values.items():
            series[name].append(value)
    print("\nseries                     points     first      last")
    for name, values in sorted(series.items()):
        print(f"{name:25}  {len(values):6}  {values[0]:8.4f}  {values[-1]:8.4f}")
    return layout


def show_layers(layout):
    """The table of layers, which has its own panel: where signs fit worst, and what each phase made of it."""
    rows = [dict(zip(LAYER_COLUMNS, row, strict=True)) for row in layout.rows()]
    rows.sort(key=lambda row: -row["initialize_error"])
    print("\nlinears with the largest error     rank  after ADMM  after block  after model")
    for row in rows[:4]:
        errors = (row["initialize_error"], row["block_error"], row["model_error"])
        shown = "  ".join(f"{error:11.4f}" for error in errors)
        print(f"{row['layer']:32} {row['rank']:6.0f} {shown}")


def main():
    folder = Path(tempfile.mkdtemp())
    page = Path(sys.argv[1]) if len(sys.argv) > 1 else folder / "report"
    model, tokenizer = small_model(steps=100)
    for part in (model, tokenizer):
        part.save_pretrained(folder / "dense")
    out = folder / "out"
    text = folder / "text.txt"
    text.write_text(TRAIN.read_text(encoding="utf-8")[:50_000], encoding="utf-8")
    nanoquant(["quantize", str(folder / "dense"), str(out), "--text", str(text), *FLAGS.split()])

    # 1. The files. A run that was killed or failed reads the same way, up to where it came.
    run = read_run(find_run(str(out)))
    print(
        f"\nstatus {run.status}; files: {', '.join(sorted(f.name for f in run.folder.iterdir()))}"
    )
    print(f"{len(run.rows)} records, seconds of phases:")
    for phase, seconds in run.get("seconds").items():
        print(f"  {phase:10} {seconds:6.1f}")

    # 2. The dashboard. "model" is the training against the dense model over its steps: the loss should fall and the
    # share of flipped signs grow slowly. "block_00" is one block over its steps, whose loss falls while latents and
    # scales are tuned. "blocks" is over depth: an error that jumps at one block names the place to give more bits.
    layout = show_dashboard(run)

    # 3. The layers. Weight errors may rise after ADMM: from there on outputs are what is trained, not weights.
    show_layers(layout)

    # 4. The report: one page with the same figures as plots, singular spectra of the dense weights beside them.
    if importlib.util.find_spec("matplotlib") is None:
        print("\nno report: it needs the package matplotlib, pip install 'nanoquant[plots]'")
        return
    print()
    nanoquant(["report", str(out), "--output", str(page), "--spectra", "3"])
    print(f"plots: {', '.join(sorted(file.stem for file in page.glob('*.png')))}")


if __name__ == "__main__":
    main()
