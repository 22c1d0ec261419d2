"""Damages the other files that nanoquant reads, by the rules of fuzz_checkpoints: states, kept tensors, records,
adapters, YAML.

python tests/fuzz_readers.py --cases 20000 --seed 0
"""

import dataclasses
import itertools
import json
import random
import shutil
import sys
import traceback

import torch
from fuzz_adapters import adapter_files
from fuzz_damage import (
    change_value,
    cut,
    doubled,
    flip,
    headers,
    lengths,
    nested,
    payload,
)
from fuzz_kinds import other_kind
from fuzz_run import DOCUMENTED, FREE, MULTIPLE, clear_peak, limited, main, resident
from fuzz_states import deflated, other_value, swollen
from packed_models import random_factors
from safetensors.torch import save_file

from nanoquant.ablation.cells import read_record as read_cell
from nanoquant.ablation.plan import read_plan
from nanoquant.data import load_tokens
from nanoquant.evaluation.compare import read_record
from nanoquant.interchange.convert import words_of_layer
from nanoquant.interchange.read import read_state, split_state
from nanoquant.packed_linear import PackedBinaryLinear
from nanoquant.parsers import parse_quantize
from nanoquant.report.run_files import read_run
from nanoquant.sensitivity import GroupLoss, SensitivityFile
from nanoquant.tensor_file import TensorFile

YAML = b"""bits: 0.8
method: binary
text: [a.txt, b.txt=2]
budget:
  rank_multiple: 8
admm: {iterations: 20, regularization: 0.03}
block.windows: 4
run: {seed: 3}
"""
PLAN = b"mode: grid\nbase: {bits: 1.0}\naxes:\n  admm.iterations: [10, 20]\n  kind:\n    one: {bits: 0.8}\n"
LAUGHS = [
    f"{b}: &{b} [{', '.join([f'*{a}'] * 9)}]" for a, b in itertools.pairwise("abcdefghijklmn")
]
BOMBS = (
    "\n".join(["a: &a [x, x]", *LAUGHS]).encode(),
    b"text: &a [x,x]\n" + b"bits: " + b"[" * 20_000,
    b"text: !!python/object/apply:os.system ['echo']\n",
    b"&a text: *a\n",
    b"text: &a [*a]\n",
    b"bits: &a {b: *a}\n",
    b"bits: 2020-01-01\n",
    b"? [1, 2]\n: 3\n",
    b"1: 2\ntrue: 3\nbits: .nan\n",
    b"bits: " + b"9" * 10_000 + b"\n",
    b"<<: {bits: 1}\n<<: [1]\n",
    b"budget: 3\n",
    b"admm: [1]\n",
    b"axes: {a: 3, 4: [5], null: null}\nbase: [1]\n",
    b"config: x.yaml\n",
)
"""YAML that is meant to hurt, and kinds that nobody expects."""
JSON = {"bits": flip, "values": change_value, "doubled": doubled, "cut": cut}
JSON["depth"] = lambda _, rng: nested(rng, rng.choice((100, 5_000, 200_000)))
TENSORS = {"bits": flip, "headers": headers, "lengths": lengths, "data": payload, "cut": cut}
BYTES = {"bits": flip, "cut": cut, "depth": JSON["depth"]}
PICKLES = BYTES | {"values": other_value, "swollen": swollen, "deflated": deflated}
BOMBED = BYTES | {
    "bomb": lambda _, rng: rng.choice(BOMBS),
    "line": lambda c, rng: swap_value(c, rng),
}


@dataclasses.dataclass(frozen=True)
class Reader:
    """A file that is read.

    Args:
        name: of the file.
        content: intact bytes.
        read: called with the file.
        damages: ways to change the content.
    """

    name: str
    content: bytes
    read: object
    damages: dict
    found: bool = True
    """Whether a folder's file is read; one that is named on the command line may be a pipe, which is waited for."""


def swap_value(content, rng):
    """A line of YAML with another value."""
    lines = content.splitlines()
    place = rng.randrange(len(lines))
    values = (
        "",
        "null",
        "-1",
        "1e999",
        "[1, {a: b}]",
        "{a: [1]}",
        "true",
        "'",
        "9" * 400,
        "!!binary x",
        "\x00",
        "0x10",
    )
    lines[place] = lines[place].split(b":")[0] + b": " + rng.choice(values).encode()
    return b"\n".join(lines)


def state():
    """Tensors of two packed linears, and of what stays dense, as other programs save them."""
    tensors = {"norm.weight": torch.ones(24)}
    for seed, name in enumerate(("layers.0.up", "layers.0.down")):
        layer = PackedBinaryLinear.from_factors(random_factors(24, 40, 13, seed), torch.zeros(24))
        tensors |= {
            f"{name}.{part}": tensor.clone() for part, tensor in words_of_layer(layer).items()
        }
    return tensors


def write_tensors(root):
    """Files of tensors, and of what was measured."""
    save_file(state(), root / "words.safetensors")
    torch.save(state(), root / "words.pt")
    torch.save(state(), root / "old.pt", _use_new_zipfile_serialization=False)
    torch.save(torch.arange(50), root / "ids.pt")
    kept = TensorFile(root / "kept.safetensors", {"of": "a"}, "logits")
    kept.write(
        {"log_p": torch.randn(2, 4, 3), "ids": torch.ones(2, 4, 3, dtype=torch.int32)}, {"step": 3}
    )
    losses = SensitivityFile(root / "losses.json", "f")
    losses.add("layers.0", GroupLoss(0.5, {"layers.0.up": {8: 0.25, 16: 0.125}}))


def read_words(file):
    split_state(read_state(file))


def config(file):
    parse_quantize(["dense", "out", "--text", "x.txt", "--config", str(file)])


def of_folder(file):
    read_run(file.parent)


def tokens(file):
    load_tokens(str(file), None)


def make_intact(root):
    """Readers by name; each has its intact content."""
    root.mkdir()
    write_tensors(root)
    record = {
        "format": 1,
        "protocols": {"text": {}},
        "results": {"text": {"perplexity": 3.0}},
        "tokenizer": {},
    }
    head = json.dumps({"format": 1, "source": "dense", "bits": 1.0, "settings": {"a": 1}}).encode()
    rows = b"\n".join(
        json.dumps({"phase": "block", "step": i, "loss": 1.0 / (i + 1)}).encode() for i in range(9)
    )
    lines = b'{"text": "the river runs"}\n{"messages": [{"role": "user", "content": "hi"}]}\n'

    def content(name):
        return (root / name).read_bytes()

    files, read_adapter = adapter_files(root / "adapter")
    adapters = (
        Reader(name, whole, read_adapter, JSON if name.endswith(".json") else TENSORS)
        for name, whole in files.items()
    )
    return {
        reader.name: reader
        for reader in (
            *adapters,
            Reader("words.safetensors", content("words.safetensors"), read_words, TENSORS),
            Reader("words.pt", content("words.pt"), read_words, PICKLES),
            Reader("old.pt", content("old.pt"), read_words, BYTES),
            Reader("ids.pt", content("ids.pt"), tokens, PICKLES),
            Reader(
                *("kept.safetensors", content("kept.safetensors")),
                *(lambda file: TensorFile(file, {"of": "a"}, "logits").read(), TENSORS),
            ),
            Reader("losses.json", content("losses.json"), lambda f: SensitivityFile(f, "f"), JSON),
            Reader(
                "record.json",
                json.dumps(record).encode(),
                lambda f: read_record(str(f)),
                JSON,
                False,
            ),
            Reader("cell.json", json.dumps(record).encode(), read_cell, JSON),
            Reader("run.json", head, of_folder, JSON),
            Reader("metrics.jsonl", rows, of_folder, BYTES),
            Reader("text.jsonl", lines, tokens, BYTES),
            Reader("config.yaml", YAML, config, BOMBED, False),
            Reader("plan.yaml", PLAN, lambda file: read_plan(file, "dense"), BOMBED, False),
        )
    }


def run_case(intact, folder, seed, number):
    """Damage, read and judge: the damage, the outcome, and what is wrong with it or None."""
    rng = random.Random(f"{seed} {number}")
    reader = intact[rng.choice(list(intact))]
    damage = rng.choice([*reader.damages, *(["kinds of files"] if reader.found else [])])
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    file = folder / reader.name
    if damage == "kinds of files":
        file.write_bytes(reader.content)
        other_kind(file, rng)
        size = len(reader.content)
    else:
        file.write_bytes(reader.damages[damage](reader.content, rng))
        size = file.stat().st_size
    clear_peak()
    before = resident()
    outcome, wrong = limited(lambda: judge(reader, file))
    if damage in ("swollen", "deflated") and outcome == "read":
        wrong = "was read, though it has more in memory than in the file"
    if wrong is None and resident() - before > MULTIPLE * size + FREE:
        wrong = f"took {resident() - before} bytes of memory for a file of {size}"
    return f"{reader.name} | {damage}", outcome, wrong


def judge(reader, file):
    """Outcome of reading, and what is wrong with it or None."""
    try:
        reader.read(file)
    except DOCUMENTED as error:
        return f"refused: {type(error).__name__}", None
    except Exception:
        return "undocumented", traceback.format_exc(limit=-6)
    return "read", None


if __name__ == "__main__":
    sys.exit(main(make_intact, run_case, __doc__))
