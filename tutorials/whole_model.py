"""Quantize a whole model, read what was done, save it, load it, and let it write.

    python tutorials/whole_model.py

The model is trained for some seconds first, so it reads like very bad English; what counts is the difference that bits
make. A real model takes the same four calls.
"""

import copy
import tempfile
from pathlib import Path

from small_model import TEST, TRAIN, small_model, windows

import nanoquant


def main():
    dense, tokenizer = small_model()
    held_out = windows(tokenizer, TEST, 64)
    print(f"dense: perplexity {nanoquant.perplexity(dense, held_out, 16).value:.2f}")

    # 1. A config is a preset and what differs from it. Stages are given as dicts; `nanoquant quantize --help` explains
    # each field. Ranks come in steps of 8 here, because a model this small has no room for steps of 32, and nothing is
    # compiled, which pays from minutes of training on.
    config = nanoquant.nanoquant_config(
        bits=1.5,
        preset="fast",
        budget={"rank_multiple": 8},
        calibration={"windows": 32, "length": 64},
        model={"windows": 256, "batch": 8, "held_out": 16, "compile_from": None},
    )

    # 2. quantize changes the model in place: calibration, ranks, blocks, the whole model against the dense one, and
    # packing. Text is the name of a file, of a data set, or token ids as here.
    model = copy.deepcopy(dense)
    report = nanoquant.quantize(model, windows(tokenizer, TRAIN, 300).flatten(), config, tokenizer)
    print("\nphase        seconds")
    for phase, seconds in report.seconds.items():
        print(f"{phase:12} {seconds:7.1f}")

    # 3. The report says which rank each linear got by the loss that it costs, and how training went.
    print("\nlinear                            rank")
    for name, rank in report.ranks.items():
        print(f"{name:32} {rank:5}")
    print("\nstep  KL from the dense model on held-out windows")
    for step, divergence in report.model.held_out.items():
        print(f"{step:4}  {divergence:.4f}")

    # 4. Four figures of size, because one misleads: the body is what the budget is about; embedding and norms stay.
    sizes = report.sizes
    print(f"\nbits a weight of the quantized linears: {sizes.body_bits_per_weight:.3f}")
    print(f"bits a parameter of the whole model:    {sizes.model_bits_per_parameter:.3f}")
    print(f"bytes on disk {sizes.bytes_on_disk:,}, resident {sizes.bytes_resident:,}")

    # 5. A checkpoint is a folder that transformers loads as well, after `import nanoquant`, without remote code.
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "packed")
        nanoquant.save_pretrained(model, path, tokenizer=tokenizer)
        print(f"\nfiles: {', '.join(sorted(file.name for file in path.iterdir()))}")
        loaded = nanoquant.load(path)
    value = nanoquant.perplexity(loaded, held_out, 16).value
    print(f"loaded: perplexity {value:.2f}")

    # 6. Generation goes through the packed operator.
    settings = nanoquant.GenerationSettings(max_new_tokens=40)
    for name, one in (("dense", dense), ("packed", loaded)):
        print(f"{name:6} {nanoquant.generate(one, tokenizer, 'The city ', settings).texts[0]!r}")


if __name__ == "__main__":
    main()
