"""What each phase is worth: the same model with the phases switched on one after the other.

    python recipes/ablate_phases.py                      the demo model's first ten blocks, preset paper
    python recipes/ablate_phases.py --preset fast --blocks 0:4 --windows 16

Each arm starts from the dense model. An arm that changes nothing, because the preset leaves its phase out, is skipped.
"""

import argparse
import copy
import dataclasses
import math
import time

from get_demo_model import ROOT, demo_model

from nanoquant.console import ConsoleProgress, note, quiet, say, table

DATA = ROOT / "recipes" / "data"


def arms(config):
    """Name and configuration of each arm, each with one phase more than the one before."""
    off = dataclasses.replace
    refine = off(config, model=off(config.model, train="none"))
    dense = off(refine, block=off(refine.block, refine_epochs=0))
    start = off(dense, block=off(dense.block, dense_epochs=0))
    steps = {"initialization": start, "+ dense tuning": dense, "+ latent tuning": refine}
    last = None
    for name, arm in (steps | {"+ model reconstruction": config}).items():
        if arm != last:
            yield name, arm
        last = arm


def run(arguments):
    from nanoquant import nanoquant_config, perplexity, quantize
    from nanoquant.data import load_tokens, make_windows
    from nanoquant.sources import device_of, find_model, load_model, load_tokenizer

    folder = find_model(arguments.model or str(demo_model()))
    config = nanoquant_config(arguments.bits, arguments.preset, blocks=arguments.blocks)
    tokenizer, dense = load_tokenizer(folder), load_model(folder, device_of("auto"))
    tokens = load_tokens(arguments.text, tokenizer)
    held_out = make_windows(
        load_tokens(arguments.eval_text, tokenizer), arguments.length, arguments.windows
    )
    before = perplexity(dense, held_out).value
    rows = [["dense", f"{before:.2f}", "", ""]]
    for name, arm in arms(config):
        note(f"{name}, preset {arguments.preset}, blocks {arguments.blocks or 'all'}")
        model, begun = copy.deepcopy(dense), time.perf_counter()
        quantize(
            model,
            tokens,
            arm,
            tokenizer,
            progress=ConsoleProgress(["calibrate", "blocks", "model", "pack"]),
        )
        seconds = time.perf_counter() - begun
        after = perplexity(model, held_out).value
        rows.append([name, f"{after:.2f}", f"{math.log(after / before):.3f}", f"{seconds:.0f}"])
        note(f"{name}: perplexity {after:.2f}")
    say(table(rows, header=["arm", "perplexity", "excess, nats", "seconds"]))


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--model", help="folder; the demo model by default")
    parser.add_argument("--text", default=str(DATA / "wiki_train.txt"))
    parser.add_argument("--eval_text", default=str(DATA / "wiki_test.txt"))
    parser.add_argument("--bits", type=float, default=1.0)
    parser.add_argument("--preset", default="paper")
    parser.add_argument("--blocks", default="0:10")
    parser.add_argument("--windows", type=int, default=32, help="held-out windows")
    parser.add_argument("--length", type=int, default=512, help="tokens of a held-out window")
    quiet()
    run(parser.parse_args())


if __name__ == "__main__":
    main()
