"""The model card of a checkpoint: what it is, how good, how it was made and how to run it, from its own files.

The head is what hubs read; licence and language are those of the dense model's card. Everything below it comes from
``config.json``, the record of the run beside the folder, and evaluations of it. What is not known is said to be so.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData, metadata_load
from yaml import YAMLError

from nanoquant.checkpoint import read_sizes
from nanoquant.checkpoint_files import read_json
from nanoquant.config import NanoQuantConfig
from nanoquant.hub.reproduce import quantize_line, shown
from nanoquant.job_config import JobConfig
from nanoquant.sizes import Sizes
from nanoquant.sources import weight_bytes

CARD = "README.md"
CARRIED = ("license", "license_name", "license_link", "language")
"""Fields of the head that a quantized model has from the dense one."""
MARK = "nanoquant"
"""Tag by which a card is known to be generated here."""
METHODS = {
    "binary": "Every linear of the decoder is `y = s1 * (U (V^T (s2 * x)))` with signs U, V and a scale for every "
    "channel (NanoQuant, arXiv 2602.06694).",
    "product": "Weights of every linear of the decoder are looked up, a group at a time, in codebooks (product "
    "quantization, with a second codebook for what the first leaves where bits allow), with a scale for every row.",
}


@dataclass(frozen=True)
class Known:
    """What a folder and the record of its run tell."""

    folder: Path
    sizes: Sizes
    recipe: dict[str, Any]
    """How it was made, from config.json; empty where that does not say."""
    record: dict[str, Any]
    """run.json; empty where there is none, or it is of another checkpoint."""
    head: dict[str, Any]
    """Head of the card that is there: that of the dense model, or an earlier one of this module."""
    license: str | None
    """A licence that the user names in the place of the carried one."""
    anew: bool = False
    """Whether nothing of a card that is there is kept but licence and language."""

    @property
    def config(self) -> NanoQuantConfig | None:
        """Configuration of the run; None where it is unknown, or has what this version does not know."""
        found = self.recipe.get("config")
        try:
            return NanoQuantConfig.from_dict(found) if isinstance(found, dict) else None
        except (TypeError, ValueError):
            return None

    @property
    def job(self) -> dict[str, Any]:
        """What was read and measured; empty where it is unknown."""
        return self.record.get("job") or {}

    @property
    def source(self) -> str | None:
        """The dense model, by Hub name or the last part of a path."""
        found = self.recipe.get("source")
        return None if found is None else shown(found)

    @property
    def hub_source(self) -> str | None:
        """The same where it is a Hub name."""
        return self.recipe.get("base_model") or (self.head.get("base_model") if self.own else None)

    @property
    def own(self) -> bool:
        """Whether the card that is there was generated here."""
        return MARK in (self.head.get("tags") or [])

    @property
    def keeps(self) -> bool:
        """Whether the text of the card that is there stays."""
        return self.own and not self.record and not self.anew

    @property
    def body(self) -> str | None:
        """What a generated card tells below its head, where nothing here can tell it again: its run is not at hand."""
        return ModelCard.load(self.folder / CARD).text if self.keeps else None


def known_of(
    folder: Path, record: dict[str, Any], license: str | None = None, anew: bool = False
) -> Known:
    """Read what a checkpoint tells of itself.

    Args:
        folder: the checkpoint.
        record: run.json of its run; of another one it is left out.
        license: in the place of that of the dense model.
        anew: keep nothing of a card that is there but licence and language.

    Raises:
        ValueError: the folder is no checkpoint, or the head of its card can't be read.
    """
    settings = read_json(folder / "config.json").get("quantization_config") or {}
    recipe = settings.get("recipe") or {}
    report = (record.get("figures") or {}).get("report") or {}
    same = bool(recipe) and report.get("seconds") == recipe.get("seconds")
    file = folder / CARD
    try:
        head = (metadata_load(file) if file.is_file() else None) or {}
    except (ValueError, YAMLError) as error:
        raise ValueError(
            f"{file} has a head that is no YAML mapping; mend it or remove it: {error}"
        ) from None
    return Known(folder, read_sizes(folder), recipe, record if same else {}, head, license, anew)


def model_card(known: Known) -> str:
    """The card as text: YAML head and Markdown."""
    head = f"---\n{_head(known).to_yaml()}\n---\n"
    if known.body is not None:
        return f"{head}{known.body}"
    parts = [
        f"# {known.folder.name}",
        _what(known),
        "## How good it is",
        _figures(known),
        "## How to run it",
        _running(known),
        "## How it was made",
        _making(known),
        "## Limits",
        _limits(known),
    ]
    return head + "\n" + "\n\n".join(parts) + "\n"


def renamed(card: str, old: str, new: str) -> str:
    """A generated card in which the checkpoint ``old`` is called ``new``, as a hub does."""
    for line in ("# {}\n", 'from_pretrained("{}")', "`nanoquant generate {} "):
        card = card.replace(line.format(old), line.format(new))
    return card


def _head(known: Known) -> ModelCardData:
    carried = {name: known.head[name] for name in CARRIED if name in known.head}
    if known.license is not None:
        carried = {"language": carried.get("language"), "license": known.license}
    return ModelCardData(
        base_model=known.hub_source,
        base_model_relation="quantized" if known.hub_source else None,
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=[MARK, "quantized", "torchao"],
        **{name: value for name, value in carried.items() if value is not None},
    )


def _what(known: Known) -> str:
    config = known.config
    method = METHODS[config.method] if config else "Its linears are packed by nanoquant."
    of = f" of `{known.source}`" if known.source else ""
    bits = f"{known.sizes.body_bits_per_weight:.4f}"
    some = config is not None and config.blocks
    which = f" of decoder blocks {config.blocks}, all others dense" if some else ""
    return f"A version{of} with {bits} bits per weight in its linears{which}. {method}"


def _figures(known: Known) -> str:
    """Sizes and perplexity, dense row first, and the protocol."""
    figures, config, sizes = known.record.get("figures") or {}, known.config, known.sizes
    rows = []
    dense = figures.get("dense")
    if dense:
        rows.append(
            ["dense", *_row(Sizes(**dense["sizes"]), dense["file_bytes"], dense["perplexity"])]
        )
    own = (figures.get("quantized") or {}).get("perplexity")
    rows.append(["this", *_row(sizes, weight_bytes(known.folder), own)])
    header = ["", "bits a weight, linears", "bits a weight, whole", "bytes", "perplexity"]
    lines = [_table(rows, header)]
    job = known.job
    if own is None and known.record:
        lines.append("Nobody has measured its quality; it was made without held-out text.")
    elif own is None:
        lines.append("The record of its run is not at hand, and so no measurement of its quality.")
    else:
        lines.append(
            f"Perplexity of {job['eval_windows']} windows of {job['eval_length']} tokens of "
            f"`{shown(job['eval_text'])}`, each token's loss within its window. Lower is better; the dense row is what "
            "was lost from."
        )
    if config and config.embedding.bits not in (16, None):
        lines.append(f"Embedding and head have {config.embedding.bits} bits.")
    return "\n\n".join(lines)


def _table(rows: list[list[str]], header: list[str]) -> str:
    """A table in Markdown."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _row(sizes: Sizes, file_bytes: int, perplexity: float | None) -> list[str]:
    body = sizes.body_bits_per_weight
    body = f"{sizes.model_bits_per_parameter:.0f}" if body is None else f"{body:.4f}"
    measured = "not measured" if perplexity is None else f"{perplexity:.2f}"
    return [body, f"{sizes.model_bits_per_parameter:.4f}", f"{file_bytes:,}", measured]


def _running(known: Known) -> str:
    name = known.folder.name
    return (
        "```python\n"
        "import nanoquant\n"
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        f'tokenizer = AutoTokenizer.from_pretrained("{name}")\n'
        f'model = AutoModelForCausalLM.from_pretrained("{name}")\n'
        'inputs = tokenizer("The city lies", return_tensors="pt")\n'
        "print(tokenizer.decode(model.generate(**inputs, max_new_tokens=40)[0]))\n"
        "```\n\n"
        f'or `nanoquant generate {name} --prompt "The city lies"`. No remote code is loaded.'
    )


def _making(known: Known) -> str:
    if file := known.recipe.get("imported"):
        return f"Its signs and scales are those of `{file}`, read by `nanoquant import`."
    if known.config is None:
        other = "by a version of nanoquant with other settings; config.json has them"
        return f"It was made {other}." if "config" in known.recipe else "It is not on record how."
    lines = []
    if known.job:
        default = {
            f.name: f.default
            for f in dataclasses.fields(JobConfig)
            if f.default is not dataclasses.MISSING
        }
        line = quantize_line(known.job, known.config, default)
        lines.append(f"```\n{line}\n```")
    lines.append(f"Calibration and training text: {_text(known)}.")
    versions = known.recipe.get("versions") or {}
    if versions:
        lines.append(
            "With " + ", ".join(f"{what} {value}" for what, value in versions.items()) + "."
        )
    if tuned := known.recipe.get("fine_tuning"):
        lines.append(_tuning(tuned))
    return "\n\n".join(lines)


def _tuning(tuned: dict[str, Any]) -> str:
    """What was trained after the quantization."""
    teacher = tuned.get("teacher")
    to = f"to give what `{shown(teacher)}` gives" if teacher else "for the next token"
    return f"Its scales, biases and norms were then trained {to} on `{shown(tuned['text'])}`."


def _text(known: Known) -> str:
    """Where the text is from, and how many tokens of it there are."""
    report = (known.record.get("figures") or {}).get("report") or {}
    sources = report.get("text") or []
    if sources:
        return ", ".join(_source(source) for source in sources)
    given = known.recipe.get("text")
    texts = given if isinstance(given, list) else [given]
    return ", ".join(f"`{shown(text)}`" for text in texts if text) or "not on record"


def _source(source: dict[str, Any]) -> str:
    """One text, and its tokens where they were counted: not of what the model wrote itself."""
    tokens, name = source.get("tokens"), shown(source["source"])
    if tokens is None:
        return "text that the dense model wrote" if name == "self" else f"`{name}`"
    return f"`{name}` ({tokens:,} tokens)"


def _limits(known: Known) -> str:
    return (
        "So few bits cost quality: expect wrong answers, most of all in mathematics, code and long texts, and judge "
        "the model by your own task. It has the dense model's biases and licence, and whatever safety training that "
        "had may hold less well; nobody has tested that. It runs with `nanoquant` installed."
    )
