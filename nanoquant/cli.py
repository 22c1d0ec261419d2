"""The command line: ``nanoquant quantize | resume | evaluate | generate | inspect | bench | advise | ...``.

Heavy imports wait until the command is known, so that the list of commands and a mistyped one answer at once.
"""

from __future__ import annotations

import importlib
import os
import signal
import sys
from collections.abc import Callable, Sequence
from typing import NoReturn

from nanoquant.console import quiet, say

USAGE = """usage: nanoquant COMMAND ...

Language models at one bit per weight and below: binary low-rank factors of every linear.

commands:
  quantize MODEL OUT --text FILE    quantize a model, save a checkpoint, measure it in a fresh process
  resume OUT                        go on with a quantization that was killed
  evaluate MODEL --text FILE        perplexity, KL from the dense model, zero-shot tasks; --compare A B
  generate MODEL --prompt TEXT      continue a text
  inspect FOLDER                    sizes, ranks and recipe of a checkpoint
  bench                             speed and memory of packed layers and models on this machine
  advise MODEL --memory 8GB         what to use for a memory and a task, before anything is computed
  estimate MODEL                    ranks, bytes, memory, disk and time of a quantization, beforehand
  doctor MODEL                      what would stop a quantization on this machine
  report OUT                        one page of plots from what a run recorded
  import FILE --output OUT --dense MODEL
                                    checkpoint from the published code's packed state
  export OUT --output DIR           its signs as 32-bit words in safetensors
  card OUT                          model card of a checkpoint, with its figures and how to make it again
  push OUT --name OWNER/NAME        upload a checkpoint and its card to a hub
  serve OUT                         answer requests in the protocol of OpenAI, by transformers serve

"nanoquant COMMAND --help" explains every flag; dashes and underscores in flags are the same.
NANOQUANT_DEBUG=1 shows the traceback of an error.
"""
MOST_CHARACTERS = 1000
LOST = (
    "another process of this run has ended or does not answer; what is finished is kept, and the same command goes on "
    "there, with any number of processes"
)


def run() -> NoReturn:
    """Entry point of the console script; a termination signal ends it as an interruption does."""
    signal.signal(signal.SIGTERM, _terminated)
    sys.exit(main())


def _terminated(*_: object) -> NoReturn:
    raise KeyboardInterrupt


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        arguments: of the command line, by default those of the process.

    Returns:
        The exit code: 0, 2 for bad input (one line on stderr says what), 130 when interrupted, 1 when another process
        of the run is lost, 1 or its own for a library that leaves the process.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    quiet()
    try:
        if not arguments or arguments[0] in ("-h", "--help"):
            say(USAGE.rstrip())
            return 0 if arguments else 2
        if arguments[0] == "--version":
            from nanoquant import __version__

            say(f"nanoquant {__version__}")
            return 0
        command = COMMANDS.get(arguments[0])
        if command is None:
            allowed = ", ".join(COMMANDS)
            raise ValueError(f"there is no command {arguments[0]!r}; commands are {allowed}")
        command(arguments[1:])
    except KeyboardInterrupt:
        return _stopped()
    except SystemExit as stop:
        if stop.code is None or isinstance(stop.code, int):
            return stop.code or 0
        sys.stderr.write(f"nanoquant: error: {stop.code}\n")
        return 1
    except Exception as error:
        if _another_is_lost(error):
            _tell(f"nanoquant: error: {LOST}", unless_told=True)
            return 1
        if os.environ.get("NANOQUANT_DEBUG") or not _is_input_error(error):
            raise
        _tell(f"nanoquant: error: {_one_line(error)}")
        return 2
    return 0


def _stopped() -> int:
    _tell("nanoquant: interrupted", unless_told=True)
    return 130


def _tell(message: str, unless_told: bool = False) -> None:
    """Write to stderr how the command ends; of several processes that end alike one does."""
    if "torch" in sys.modules:
        from nanoquant.processes import tells

        if not tells(message, unless_told):
            return
    sys.stderr.write(f"{message}\n")


def _another_is_lost(error: Exception) -> bool:
    if "torch" not in sys.modules:
        return False
    from nanoquant.processes import lost

    return lost(error)


def _is_input_error(error: Exception) -> bool:
    """Whether the message is for the user; any other error is a fault of ours and shows all."""
    kinds = (ValueError, OSError, FloatingPointError, MemoryError)
    return isinstance(error, kinds) or type(error).__name__ in ("ArgumentError", "OutOfMemoryError")


def _one_line(error: Exception) -> str:
    """The message of an error in one line of bearable length."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= MOST_CHARACTERS else f"{text[:MOST_CHARACTERS]} ..."


def _quantize(arguments: list[str]) -> None:
    from nanoquant.parsers import parse_quantize

    job, config = parse_quantize(arguments)
    from nanoquant.job import run_job

    run_job(job, config)


def _resume(arguments: list[str]) -> None:
    from nanoquant.parsers import parse_resume

    output = parse_resume(arguments)
    from nanoquant.resume import resume_command

    resume_command(output)


def _evaluate(arguments: list[str]) -> None:
    from nanoquant.parsers import parse_evaluate

    job, request = parse_evaluate(arguments)
    from nanoquant.evaluation.command import evaluate_command

    evaluate_command(job, request)


def _bench(arguments: list[str]) -> None:
    from nanoquant.parsers import parse_bench

    config = parse_bench(arguments)
    from nanoquant.benchmark.command import bench_command

    bench_command(config)


def _estimate(arguments: list[str]) -> None:
    from nanoquant.parsers import parse_estimate

    request, config = parse_estimate(arguments)
    from nanoquant.estimate.command import estimate_command

    estimate_command(request, config)


def _report(arguments: list[str]) -> None:
    from nanoquant.parsers import parse_report

    config = parse_report(arguments)
    from nanoquant.report.command import report_command

    report_command(config)


def _serve(arguments: list[str]) -> None:
    from nanoquant.serving.command import serve_command

    serve_command(arguments)


def _other(name: str, what: str, module: str = "nanoquant.commands") -> Callable[[list[str]], None]:
    """The command whose function in a module has the flags as its arguments."""

    def command(arguments: list[str]) -> None:
        from nanoquant.parsers import command_parser, parse

        function = getattr(importlib.import_module(module), f"{name}_command")
        function(**vars(parse(command_parser(name, function, what), arguments)))

    return command


COMMANDS: dict[str, Callable[[list[str]], None]] = {
    "quantize": _quantize,
    "resume": _resume,
    "evaluate": _evaluate,
    "generate": _other("generate", "Continue a text with a dense or quantized model."),
    "inspect": _other(
        "inspect", "Show sizes, ranks and recipe of a checkpoint without its weights."
    ),
    "bench": _bench,
    "advise": _other(
        "advise",
        "Say what to use for a memory and a task; MODEL may also be a published name, as llama-2-7b.",
        "nanoquant.advice.command",
    ),
    "estimate": _estimate,
    "doctor": _other(
        "doctor",
        "Look for what would stop a quantization of MODEL on this machine, before anything is computed.",
        "nanoquant.doctor.command",
    ),
    "report": _report,
    "card": _other("card", "Write the model card of a checkpoint.", "nanoquant.hub.command"),
    "import": _other(
        "import", "Make a checkpoint from a packed state.", "nanoquant.interchange.command"
    ),
    "export": _other(
        "export", "Write a checkpoint's signs as words.", "nanoquant.interchange.command"
    ),
    "push": _other("push", "Upload a checkpoint to a hub.", "nanoquant.hub.command"),
    "serve": _serve,
}
