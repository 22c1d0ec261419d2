"""Damages checkpoints and loads them: an error of a documented kind or the tensors that the files hold, nothing else.

Every case is one damage of one small checkpoint, by a generator of its own, so that a number is enough to see it again:

    python tests/fuzz_checkpoints.py --cases 100000 --seed 0
    python tests/fuzz_checkpoints.py --only 4711 --seed 0

Documented are ValueError and OSError with what derives from them. A load is silent where a tensor of the model is not,
to the bit, what safetensors' own reader finds in the files under its name, or where a number is not finite. So a turned
bit in a sign or in the last digits of a scale is a legal other checkpoint: no reader without a checksum could tell.
Cases run in a process that may take no more memory than its limit, and whose end by a signal is a finding.
"""

import json
import random
import shutil
import sys
import traceback

import torch
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
from fuzz_kinds import extra, other_kind
from fuzz_run import DOCUMENTED, FREE, MULTIPLE, clear_peak, limited, main, resident
from packed_models import pack_randomly
from safetensors import safe_open
from tiny_models import tiny_gpt2, tiny_llama, tiny_qwen2

from nanoquant.checkpoint import load, read_sizes, save_pretrained
from nanoquant.embedding import EmbeddingConfig
from nanoquant.model_embeddings import quantize_embeddings
from nanoquant.product_budget import ProductShape

WEIGHTS, JSONS = "*.safetensors", "*.json"


def make_intact(root):
    """Small checkpoints of every kind of content."""
    one = {"layers": 1, "vocab_size": 64}
    half = {"layers": 1, "dtype": torch.bfloat16, "vocab_size": 64}
    models = {
        "signs": pack_randomly(tiny_llama(**one), 30),
        "signs, shards": pack_randomly(tiny_llama(**half), 13),
        "signs, biases": pack_randomly(tiny_qwen2(layers=1), 24),
        "signs, gpt2": pack_randomly(tiny_gpt2(layers=1), 16),
        "codebooks": pack_randomly(tiny_llama(**half), ProductShape(8, (6, 4))),
        "codebooks, slabs": pack_randomly(
            tiny_llama(**one, tie=False), ProductShape(4, (6,), 2), head=True
        ),
        "8-bit embedding": pack_randomly(
            quantize_embeddings(tiny_llama(**one), EmbeddingConfig(bits=8)), 8
        ),
        "4-bit embedding": pack_randomly(
            quantize_embeddings(tiny_llama(**half, tie=False), EmbeddingConfig(bits=4)), 8
        ),
    }
    for name, model in models.items():
        size = "12KB" if "shards" in name else "1GB"
        save_pretrained(model, root / name, max_shard_size=size, recipe={"bits": 1.0})
    return {name: Case(root / name) for name in models}


class Case:
    """An intact checkpoint: its files, and the tensors of the model that it gives."""

    def __init__(self, folder):
        self.files = {file.name: file.read_bytes() for file in folder.iterdir()}
        self.state = state_of(load(folder))
        self.bytes = sum(map(len, self.files.values()))

    def write(self, folder):
        for name, content in self.files.items():
            (folder / name).write_bytes(content)


def state_of(model):
    """All tensors of a model by name, tied ones under both."""
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def same_bits(one, other):
    return (one.dtype, one.shape) == (other.dtype, other.shape) and torch.equal(
        one.contiguous().reshape(-1).view(torch.uint8),
        other.contiguous().reshape(-1).view(torch.uint8),
    )


def edit(pattern, change):
    """Damage that changes the bytes of one file of a kind."""

    def damage(folder, rng):
        file = rng.choice(sorted(folder.glob(pattern)))
        file.write_bytes(change(file.read_bytes(), rng))

    return damage


def entries(folder, rng):
    """Change what the configuration says of packed layers and tables."""
    file = folder / "config.json"
    config = json.loads(file.read_text())
    part = config["quantization_config"]
    small = json.dumps(
        {k: part[k] for k in rng.sample(("modules", "tables"), 2) if k in part}
    ).encode()
    part |= json.loads(change_value(small, rng))
    file.write_text(json.dumps(config))


def counts(folder, rng):
    """Change a number of the configuration, mostly to a huge one."""
    file = folder / "config.json"
    config = json.loads(file.read_text())
    config["num_labels"] = 2
    name = rng.choice([key for key, value in config.items() if isinstance(value, int | float)])
    config[name] = rng.choice(
        (10**9, 10**10, 2**31, 2**63, 2**64, 10**30, 0, -1, -(10**9), 1e300, 10**6)
    )
    file.write_text(json.dumps(config))


def kinds(folder, rng):
    other_kind(rng.choice(sorted(folder.iterdir())), rng)


def swapped(folder, rng):
    """Two files under each other's names."""
    one, other = rng.sample(sorted(folder.iterdir()), 2)
    first, second = one.read_bytes(), other.read_bytes()
    one.write_bytes(second)
    other.write_bytes(first)


DAMAGES = {
    "bits of a configuration": edit(JSONS, flip),
    "values of a configuration": edit(JSONS, change_value),
    "values of packed layers": entries,
    "huge numbers": counts,
    "doubled keys": edit(JSONS, doubled),
    "depth of a configuration": edit(
        JSONS, lambda _, rng: nested(rng, rng.choice((100, 5_000, 200_000)))
    ),
    "headers": edit(WEIGHTS, headers),
    "bits of headers": edit(
        WEIGHTS, lambda c, rng: flip(c, rng, 0, 8 + int.from_bytes(c[:8], "little"))
    ),
    "lengths of headers": edit(WEIGHTS, lengths),
    "data": edit(WEIGHTS, payload),
    "cuts": edit("*", cut),
    "kinds of files": kinds,
    "files in each other's place": swapped,
    "further files": extra,
}


def run_case(intact, folder, seed, number):
    """Damage, load and judge: the damage, the outcome, and what is wrong with it or None."""
    rng = random.Random(f"{seed} {number}")
    damage, name = rng.choice(list(DAMAGES)), rng.choice(list(intact))
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    intact[name].write(folder)
    DAMAGES[damage](folder, rng)
    clear_peak()
    before = resident()
    outcome, wrong = limited(lambda: judge(intact[name], folder, rng))
    size = max(intact[name].bytes, sum(f.stat().st_size for f in folder.iterdir() if f.is_file()))
    if wrong is None and resident() - before > MULTIPLE * size + FREE:
        wrong = f"took {resident() - before} bytes of memory for a folder of {size}"
    return f"{damage} | {name}", outcome, wrong


def judge(case, folder, rng):
    """Outcome of reading sizes and of loading, and what is wrong with it or None."""
    try:
        read_sizes(folder)
    except DOCUMENTED as error:
        if rng.random() < 0.95:  # loading begins with the same checks
            return f"refused by its headers: {type(error).__name__}", None
    except Exception:
        return "undocumented", traceback.format_exc(limit=-6)
    try:
        found = state_of(load(folder))
    except DOCUMENTED as error:
        return f"refused: {type(error).__name__}", None
    except Exception:
        return "undocumented", traceback.format_exc(limit=-6)
    if found.keys() == case.state.keys() and all(
        same_bits(found[n], t) for n, t in case.state.items()
    ):
        return "the same tensors", None
    wrong = silent(found, folder)
    return ("silent load", wrong) if wrong else ("another legal checkpoint", None)


def silent(found, folder):
    """How a loaded model is not what the files hold; None where it is."""
    stored = {}
    for file in sorted(folder.glob(WEIGHTS)):
        with safe_open(file, "pt") as content:
            stored |= {name: content.get_tensor(name) for name in content.keys()}  # noqa: SIM118
    for name, tensor in stored.items():
        if name not in found or not same_bits(found[name], tensor):
            return f"{name} is {tensor.dtype} {tuple(tensor.shape)} in the file, and something else in the model"
    broken = [n for n, t in found.items() if t.is_floating_point() and not t.isfinite().all()]
    return f"{broken[0]} is not finite" if broken else None


if __name__ == "__main__":
    sys.exit(main(make_intact, run_case, __doc__))
