"""Parsers of the commands, made from dataclasses and signatures, so that a default is stated once.

Help comes from the docstrings under dataclass fields and from the ``Args`` of functions. Dashes and
underscores in the names of flags are the same.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import re
from collections.abc import Callable
from typing import Any

import jsonargparse
import yaml
from jsonargparse import ArgumentError, ArgumentParser, Namespace

from nanoquant.benchmark.config import BenchConfig
from nanoquant.config import DEFAULT_PRESET, NanoQuantConfig, preset_config
from nanoquant.estimate.request import EstimateConfig
from nanoquant.evaluation.command import EvaluationJob
from nanoquant.evaluation.request import EvaluationRequest
from nanoquant.job_config import JobConfig
from nanoquant.json_files import flat
from nanoquant.report.config import ReportConfig
from nanoquant.spelling import spell_out
from nanoquant.yaml_files import check_yaml, is_file, read_yaml

YAML = "checked_yaml"
"""Mode in which values and files are read."""


def command_parser(command: str, function: Callable[..., None], what: str) -> ArgumentParser:
    """Parser of a command whose first argument is its function's ``model`` and whose flags are the other ones."""
    parser, flags = _empty(command, "MODEL [flags]", what), _empty(command, "", what)
    flags.add_function_arguments(function, None)
    about = next(action.help for action in flags._actions if action.dest == "model")
    parser.add_argument("model", metavar="MODEL", help=about[0].upper() + about[1:])
    parser.add_function_arguments(function, None, skip={"model"})
    return parser


@functools.cache  # it takes half a second, and an ablation parses every cell
def quantize_parser(
    preset: str = DEFAULT_PRESET, method: str = NanoQuantConfig.method
) -> ArgumentParser:
    """Parser of ``quantize`` whose defaults are those of a preset for a method."""
    what = (
        "Quantize a dense causal language model, save it, measure it in a fresh process. "
        f"Defaults shown are those of the preset {preset}."
    )
    parser = _empty("quantize", "MODEL OUT --text TEXT [flags]", what)
    add = parser.add_argument
    add("source", metavar="MODEL", help="Folder, or Hub name, of the dense model in safetensors.")
    add("output", metavar="OUT", help="New or empty folder for the checkpoint.")
    add(
        "--config",
        action=_YamlFile,
        metavar="FILE",
        help="YAML with any of the flags; later flags win.",
    )
    parser.add_class_arguments(JobConfig, None, skip={"source", "output"})
    return _with_config(parser, preset, method)


def _with_config(parser: ArgumentParser, preset: str, method: str) -> ArgumentParser:
    """The parser with the flags of a quantization, whose defaults are those of a preset for a method."""
    what = "Bits per weight over all quantized linears; short for --budget.bits."
    parser.add_argument("--bits", type=float, help=what)
    parser.add_class_arguments(NanoQuantConfig, None, skip={"step"})
    values = preset_config(preset, method).to_dict()
    del values["step"]
    parser.set_defaults(flat(values))
    return parser


@functools.cache
def estimate_parser(
    preset: str = DEFAULT_PRESET, method: str = NanoQuantConfig.method
) -> ArgumentParser:
    """Parser of ``estimate`` whose defaults are those of a preset for a method."""
    what = (
        "Say what a quantization takes: ranks, bytes, memory, disk, time; no weight is read. "
        f"Defaults shown are those of the preset {preset}."
    )
    parser = _empty("estimate", "MODEL [flags]", what)
    what = "Folder, or Hub name, of the dense model, or a published name, as llama-2-7b."
    parser.add_argument("source", metavar="MODEL", help=what)
    parser.add_class_arguments(EstimateConfig, None, skip={"source"})
    return _with_config(parser, preset, method)


def parse_estimate(arguments: list[str]) -> tuple[EstimateConfig, NanoQuantConfig]:
    """Settings of ``estimate``: those of the preset, then of flags in their order.

    Raises:
        ValueError: unknown preset or flag, or a value out of its range.
    """
    built = _with_preset(estimate_parser, arguments)
    return _pick(EstimateConfig, built), _pick(NanoQuantConfig, built)


def parse(parser: ArgumentParser, arguments: list[str]) -> Namespace:
    """Parse, and name the nearest flags when one is unknown.

    Raises:
        ValueError: an argument is missing, unknown or of the wrong type.
    """
    try:
        return parser.parse_args(spell_out(parser, arguments))
    except ArgumentError as error:
        message = str(error)
        head, sign, rest = message.partition("are required: ")
        if sign:
            written = {a.dest: (a.option_strings or [a.metavar])[-1] for a in parser._actions}
            message = head + sign + ", ".join(written.get(n, n) for n in rest.split(", "))
        known = [flag for action in parser._actions for flag in action.option_strings]
        for flag in re.findall(r"--[\w.]+", message) if "nrecognized" in message else []:
            near = difflib.get_close_matches(flag, known, n=3)
            message += f"; flags near {flag}: {', '.join(near)}" if near else ""
        raise ValueError(f"{message}; see {parser.prog} --help") from None


def parse_quantize(arguments: list[str]) -> tuple[JobConfig, NanoQuantConfig]:
    """Settings of ``quantize``: those of the preset, then of YAML and flags in their order.

    Raises:
        ValueError: unknown preset or flag, or a value out of its range.
    """
    built = _with_preset(quantize_parser, arguments)
    return _pick(JobConfig, built), _pick(NanoQuantConfig, built)


def _with_preset(parser_of: Callable[..., ArgumentParser], arguments: list[str]) -> Namespace:
    """What arguments give over the defaults of the preset and the method that they name."""
    parser = parser_of(**_named(arguments))
    try:
        asked = parse(parser, arguments)
        _check_stages(asked)
        parser = parser_of(asked.preset, asked.method)
        return parser.instantiate_classes(parse(parser, arguments))
    except (TypeError, OverflowError) as error:
        raise ValueError(
            f"a value is of another kind than its setting, or too large a number ({error}); see {parser.prog} --help"
        ) from None


def _named(arguments: list[str]) -> dict[str, str]:
    """Preset and method that files and flags name: ``--help`` and ``--print_config`` show theirs, and end a parsing."""
    found = {"preset": DEFAULT_PRESET, "method": NanoQuantConfig.method}
    for argument, following in zip(arguments, [*arguments[1:], ""], strict=True):
        flag, equals, value = argument.partition("=")
        value = value if equals else following
        if flag in ("--preset", "--method"):
            found[flag[2:]] = value
        elif flag == "--config" and is_file(value):
            content = read_yaml(value)
            given = content if isinstance(content, dict) else {}
            found |= {name: given[name] for name in found if isinstance(given.get(name), str)}
    return found


def _check_stages(asked: Namespace) -> None:
    """Raise ValueError where a stage is given as one value."""
    for name, default in vars(NanoQuantConfig()).items():
        if dataclasses.is_dataclass(default) and not isinstance(asked.get(name, asked), Namespace):
            raise ValueError(
                f"{name} is {asked[name]!r}; it takes a mapping of its fields, as {name}: {{field: value}}"
            )


def parse_report(arguments: list[str]) -> ReportConfig:
    """Settings of ``report``.

    Raises:
        ValueError: the folder is missing, or a flag is unknown or out of its range.
    """
    parser = _empty("report", "OUT [flags]", "Draw what a run recorded as one HTML page and PNGs.")
    parser.add_argument("folder", metavar="OUT", help="Checkpoint of a run, or its OUT.run folder.")
    parser.add_class_arguments(ReportConfig, None, skip={"folder"})
    return _pick(ReportConfig, parse(parser, arguments))


def parse_resume(arguments: list[str]) -> str:
    """The output folder of ``resume``.

    Raises:
        ValueError: it is missing, or there is a flag.
    """
    parser = _empty(
        "resume", "OUT", "Go on with a quantization that was killed, as it was started."
    )
    what = "Folder that the checkpoint was to be written to; OUT.run beside it has the rest."
    parser.add_argument("output", metavar="OUT", help=what)
    return parse(parser, arguments).output


def evaluate_parser() -> ArgumentParser:
    """Parser of ``evaluate``."""
    what = "Measure a dense or quantized model by frozen protocols, or compare what was measured."
    parser = _empty("evaluate", "MODEL [flags] | --compare A B ... | --table A B ... [flags]", what)
    what = "Folder, or Hub name, of the model; left out with --compare and --table."
    parser.add_argument("model", metavar="MODEL", nargs="?", help=what)
    what = "Records, or models that are measured first: the differences of each from the first one."
    parser.add_argument("--compare", metavar="A", nargs="+", help=what)
    what = "Records that --json or --out wrote, as one table in true bits."
    parser.add_argument("--table", metavar="A", nargs="+", help=what)
    parser.add_class_arguments(EvaluationJob, None, skip={"model", "compare", "table"})
    parser.add_class_arguments(EvaluationRequest, None)
    return parser


def parse_evaluate(arguments: list[str]) -> tuple[EvaluationJob, EvaluationRequest]:
    """Settings of ``evaluate``.

    Raises:
        ValueError: unknown flag, protocol or task, or a value out of its range.
    """
    parser = evaluate_parser()
    values = parser.instantiate_classes(parse(parser, arguments))
    return _pick(EvaluationJob, values), _pick(EvaluationRequest, values)


def bench_parser() -> ArgumentParser:
    """Parser of ``bench``."""
    what = "Measure packed linears and models against bf16 on this machine, with random weights."
    parser = _empty("bench", "[flags]", what)
    parser.add_class_arguments(BenchConfig, None)
    return parser


def parse_bench(arguments: list[str]) -> BenchConfig:
    """Settings of ``bench``.

    Raises:
        ValueError: unknown flag, or a value out of its range.
    """
    return _pick(BenchConfig, parse(bench_parser(), arguments))


class _YamlFile(jsonargparse.ActionConfigFile):
    """Applies a YAML and turns its ``bits`` into ``budget.bits`` there and then, so that what comes later wins."""

    def __call__(
        self,
        parser: ArgumentParser,
        cfg: Namespace,
        values: str,
        option_string: str | None = None,
    ) -> None:
        """Apply the file ``values`` to the settings so far.

        Raises:
            ValueError: it gives both, and they differ.
        """
        if is_file(values) and not isinstance(content := read_yaml(values), dict):
            raise ValueError(f"{values} holds {content!r}; it must map names of settings to values")
        before, named = cfg.get("budget.bits"), {n: cfg.get(n) for n in ("source", "output")}
        cfg["bits"] = cfg["budget.bits"] = None
        super().__call__(parser, cfg, values, option_string)
        for name, value in named.items():
            if value is not None and cfg.get(name) != value:
                raise ValueError(
                    f"{values}: {name} is {cfg.get(name)!r}, but the command says {value!r}; leave it out of the file"
                )
        given = [bits for bits in (cfg["bits"], cfg["budget.bits"]) if bits is not None]
        if len(set(given)) > 1:
            raise ValueError(
                f"{values}: bits {given[0]} and budget.bits {given[1]} disagree; give one"
            )
        cfg["bits"], cfg["budget.bits"] = None, (given or [before])[0]


def _empty(command: str, usage: str, what: str) -> ArgumentParser:
    """A parser without flags that reads the docstrings under dataclass fields."""
    jsonargparse.set_parsing_settings(docstring_parse_attribute_docstrings=True)
    jsonargparse.set_loader(YAML, _load_yaml, exceptions=(yaml.YAMLError,))
    prog = f"nanoquant {command}"
    return ArgumentParser(
        prog=prog,
        usage=f"{prog} {usage}",
        description=what,
        exit_on_error=False,
        allow_abbrev=False,
        parser_mode=YAML,
    )


def _load_yaml(text: str) -> Any:  # noqa: ANN401
    """A value or a file as jsonargparse reads it, unless it refers to itself or is too deep."""
    check_yaml(text)
    return jsonargparse.get_loader("yaml")(text)


def _pick(kind: type, values: Namespace) -> Any:  # noqa: ANN401
    """An instance of a dataclass from the values that are its fields."""
    names = [item.name for item in dataclasses.fields(kind) if item.name in values]
    return kind(**{name: values[name] for name in names})
