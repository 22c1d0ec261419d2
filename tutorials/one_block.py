"""Quantize one decoder block by hand: what the model feeds it, which channels matter, signs, and tuning what is left.

    python tutorials/one_block.py

`nanoquant.quantize` does this for every block. Here each step stands on its own, on a model that is trained for some
seconds first. Shapes: N windows, T tokens, d hidden size.
"""

import copy

import torch
from small_model import TEST, TRAIN, small_model, windows

import nanoquant
from nanoquant.architectures import find_decoder, linear_shape
from nanoquant.block_config import BlockConfig
from nanoquant.block_reconstruction import BlockReconstructor
from nanoquant.block_tuning import BlockData
from nanoquant.budget import BudgetConfig, allocate_ranks, body_bits
from nanoquant.calibration import collect_importances
from nanoquant.decoder import capture_block_inputs, run_block
from nanoquant.importance import ImportanceConfig

BLOCK, BITS = 0, 1.5


def main():
    model, tokenizer = small_model()
    text, held_out = windows(tokenizer, TRAIN, 64), windows(tokenizer, TEST, 64)

    # 1. The structure, found by running a few tokens: the list of blocks, the linears in each, and which of these read
    # the same tensor. No name of a model family is needed.
    decoder = find_decoder(model)
    block = decoder.blocks[BLOCK]
    print(f"blocks at {decoder.path}, linears that share an input: ")
    for group in decoder.groups[BLOCK]:
        print(f"  {', '.join(group)}")

    # 2. Importances: one forward and one backward pass over text. The mean square of each input and of the gradient at
    # each output, clipped, shrunk towards their mean, normalised to mean 1 (Eq. 2 and 3 of the paper).
    known = collect_importances(model, decoder, text, ImportanceConfig(), batch_size=16)
    importances = {n: known[decoder.full_name(BLOCK, n)] for n in decoder.linears[BLOCK]}
    print("\nlinear            most important input, output, as multiples of the mean")
    for name, importance in importances.items():
        print(f"{name:16}  {importance.input.max():20.1f}  {importance.output.max():6.1f}")

    # 3. The budget: equal bits for all linears. Small matrices pay much for their scales, so this model gets more bits
    # than a large one needs.
    shapes = {name: linear_shape(block.get_submodule(name)) for name in decoder.linears[BLOCK]}
    ranks = allocate_ranks(shapes, BudgetConfig(bits=BITS, rank_multiple=8))
    print(f"\nranks {ranks}\n{body_bits(shapes, ranks):.3f} bits a weight")

    # 4. Input and target of the block: hidden states (N, T, d) as the dense model has them, and what the dense block
    # makes of them. Positions and masks are the rest of the call.
    inputs, calls = capture_block_inputs(model, decoder, text, batch_size=16)
    unseen, _ = capture_block_inputs(model, decoder, held_out, batch_size=16)
    with torch.no_grad():
        targets, wanted = (run_block(block, x, calls[BLOCK]) for x in (inputs, unseen))
    data = BlockData(inputs, targets, calls[BLOCK])

    def error(candidate):
        """Relative squared error at the block's output, on text that tunes nothing."""
        with torch.no_grad():
            made = run_block(candidate, unseen, calls[BLOCK])
        return ((made - wanted).square().sum() / wanted.square().sum()).item()

    # 5. Two reconstructions: signs alone, and signs with their latents and scales tuned to the block's output through
    # the straight-through estimator (Eq. 10). Weight errors start the same; the output is what tuning mends.
    initializer = nanoquant.ADMMInitializer(nanoquant.admm.ADMMConfig(iterations=60))
    settings = {"schedule": "algorithm1", "windows": 64, "dense_epochs": 0, "refine_batch": 16}
    settings |= {"relative_rates": True, "latent_lr": 3e-3, "scale_lr": 3e-3}
    print("\n                   error at the block's output   perplexity of the model")
    dense = nanoquant.perplexity(model, held_out, 16).value
    print(f"{'dense':10}  {0:33.4f}  {dense:23.2f}")
    for name, epochs in (("signs only", 0), ("tuned", 8)):
        changed = copy.deepcopy(model)
        candidate = changed.get_submodule(f"{decoder.path}.{BLOCK}")
        config = BlockConfig(refine_epochs=epochs, **settings)
        BlockReconstructor(config, initializer)(
            candidate, decoder.groups[BLOCK], importances, ranks, data if epochs else None
        )
        value = nanoquant.perplexity(changed, held_out, 16).value
        print(f"{name:10}  {error(candidate):33.4f}  {value:23.2f}")


if __name__ == "__main__":
    main()
