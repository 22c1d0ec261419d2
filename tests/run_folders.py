"""Run folders as ``nanoquant quantize`` writes them, of any length, with made-up figures and no computation."""

import json
import math
import random

import torch
from safetensors.torch import save_file

KINDS = {"self_attn.q_proj": (48, 48), "self_attn.v_proj": (16, 48), "mlp.down_proj": (48, 96)}
STEPS = 40
EDGES = [round(-4 + place / 8, 4) for place in range(65)]


def rows(blocks=3, kinds=KINDS, steps=STEPS):
    """Every line of a finished run's metrics.jsonl, as objects."""
    chance, t = random.Random(0), 0.0
    found = []

    def add(phase, **metrics):
        nonlocal t
        t += 1.5
        found.append({"t": t, "phase": phase, "block": None, "layer": None, "step": None} | metrics)

    add("calibrate", memory_bytes=500_000_000, seconds=12.0)
    errors = {}
    for block in range(blocks):
        for place, (kind, (d_out, d_in)) in enumerate(kinds.items()):
            where = {"block": block, "layer": f"model.layers.{block}.{kind}"}
            error = errors[block, kind] = 0.1 + 0.08 * place + 0.05 * chance.random()
            for index in range(4):
                step, loss = 4 * place + index, error / (1 + index)
                add("block", block=block, step=step, stage="refine", loss=loss)
            size = {"rank": 8 * (place + 1), "weights": d_out * d_in, "bits": 0.9 + 0.05 * place}
            add("initialize", **where, **size, error=error, target_error=error)
            add("block", **where, step=4 * place, error=0.8 * error)
        add("block", block=block, seconds=5 + block, memory_bytes=600_000_000 + 10**7 * block)
    add("model", step=0, held_out=7.2)
    for step in range(steps):
        rate = 0.01 * math.cos(math.pi / 2 * step / steps)
        add("model", step=step, loss=2 + 5 * 0.9**step + 0.1 * chance.random(), rate=rate)
        if step % 8 == 7:
            flips = {"flips": 0.05 * 0.95**step, "flips_since_start": 0.05 + 0.002 * step}
            add("model", step=step, **flips, memory_bytes=900_000_000)
        if step in (0, steps // 2, steps - 1):
            wide = 1 + step / steps
            counts = [round(1000 * math.exp(-((e / wide) ** 2))) for e in EDGES[:-1]]
            for layer in (0, blocks - 1):
                name = f"model.layers.{layer}.{next(iter(kinds))}"
                lists = {"latent_edges": EDGES, "latent_counts": counts}
                add("model", layer=name, step=step, **lists)
    add("model", step=steps, held_out=2.02)
    for (block, kind), error in errors.items():
        add("model", block=block, layer=f"model.layers.{block}.{kind}", error=1.1 * error)
    return found


def head(folder, source="dense", status="finished"):
    """run.json of a run in this folder."""
    dense = {"file_bytes": 269_060_552, "perplexity": 22.67, "sample": " by the Romans."}
    quantized = {"file_bytes": 67_404_024, "perplexity": 152.45, "sample": ".\n\n<b>the</b> river"}
    quantized["sizes"] = {"body_bits_per_weight": 0.7999, "model_bits_per_parameter": 4.003}
    job = {"eval_text": "text.txt", "eval_windows": 64, "eval_length": 512, "sample": "The city"}
    figures = {"job": job, "dense": dense, "quantized": quantized}
    return {
        "format": 1,
        "status": status,
        "error": "ValueError: the text has too few tokens" if status == "failed" else None,
        "source": str(source),
        "output": folder.name.removesuffix(".run"),
        "started": "2026-11-22T03:31:00+00:00",
        "config": {"preset": "fast", "budget": {"bits": 0.8}, "admm": {"iterations": 40}},
        "job": job,
        "versions": {"nanoquant": "0.1.0", "torch": "2.13.0"},
        "seconds": {"load": 0.8, "calibrate": 73.2, "blocks": 118.7, "model": 1103.1},
        "figures": figures if status == "finished" else None,
    }


def write_head(folder, **changes):
    """Put run.json of a run with some keys changed into the folder."""
    folder.mkdir(exist_ok=True)
    base = head(folder, changes.get("source", "dense"), changes.get("status", "finished"))
    (folder / "run.json").write_text(json.dumps(base | changes))


def write_rows(folder, found):
    """Put metrics.jsonl into the folder."""
    folder.mkdir(exist_ok=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in found))


def write_run(folder, status="finished", **changes):
    """A whole run."""
    write_head(folder, status=status, **changes)
    write_rows(folder, rows())
    return folder


def write_source(folder, blocks=3, kinds=KINDS):
    """A folder with the weights that the rows name, a random matrix each, an embedding beside them."""
    folder.mkdir()
    torch.manual_seed(0)
    tensors = {
        f"model.layers.{block}.{kind}.weight": torch.randn(shape)
        for block in range(blocks)
        for kind, shape in kinds.items()
    }
    save_file(tensors | {"model.embed.weight": torch.randn(9, 4)}, folder / "model.safetensors")
    return folder
