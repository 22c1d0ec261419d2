"""How tests call the commands: a small run, and what a command answers."""

from nanoquant.cli import main

WORDS = "the river runs over stone and light falls on an old town where people sing\n"
SMALL = (
    "--budget.rank_multiple 8 --admm.iterations 20 --calibration.windows 4 --calibration.length 32 "
    "--block.windows 4 --block.dense_epochs 0 --block.refine_epochs 0 "
    "--model.windows 8 --model.epochs 1 --model.held_out 2 --verify false"
).split()


def call(capsys, *arguments):
    """Exit code, stdout and stderr of a command."""
    code = main([str(argument) for argument in arguments])
    return code, *capsys.readouterr()


def refused(capsys, *arguments):
    """The one line with which a command refuses its input."""
    code, out, err = call(capsys, *arguments)
    assert (code, out) == (2, "")
    lines = [line for line in err.splitlines() if not line.startswith("nanoquant: phase")]
    assert len(lines) == 1 and lines[0].startswith("nanoquant: error: "), err
    return lines[0]
