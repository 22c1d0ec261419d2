"""Quantize a model of a family that the library has never seen: what the search for its structure needs.

    python tutorials/add_architecture.py

Nothing in `nanoquant/architectures.py` knows a name. It looks for the largest `nn.ModuleList` whose members hold
`nn.Linear` (or transformers' `Conv1D`), runs a few tokens, and notes in which order linears run and which of them read
the same tensor. This file makes up a family, first in a way that can't be quantized, then in one that can.
"""

import tempfile
from pathlib import Path

import torch
from small_model import TRAIN, character_tokenizer, windows
from torch import nn
from torch.nn import functional as F
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GenerationMixin,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.modeling_outputs import CausalLMOutput

import nanoquant
from nanoquant.architectures import find_decoder, linear_shape
from nanoquant.roles import block_roles


class AveragingConfig(PreTrainedConfig):
    """A made-up family: each token looks at the mean of those before it."""

    model_type = "averaging"

    def __init__(self, vocab_size=100, hidden_size=64, blocks=2, experts=0, **rest):
        super().__init__(**rest)
        self.vocab_size, self.hidden_size = vocab_size, hidden_size
        self.blocks, self.experts = blocks, experts


class AveragingBlock(nn.Module):
    """Takes hidden states first, as blocks do, and gives hidden states of the same shape (B, T, d)."""

    def __init__(self, config):
        super().__init__()
        d = config.hidden_size
        self.norm, self.mixed_norm = nn.RMSNorm(d), nn.RMSNorm(d)
        self.value, self.gate = nn.Linear(d, d, bias=False), nn.Linear(d, d, bias=False)
        self.out = nn.Linear(d, d, bias=False)
        self.up, self.down = nn.Linear(d, 2 * d, bias=False), nn.Linear(2 * d, d, bias=False)
        if config.experts:  # a weight that is no linear
            self.experts = nn.Parameter(torch.randn(config.experts, d, d) / d)

    def forward(self, hidden):
        x = self.norm(hidden)
        tokens = torch.arange(1, x.shape[1] + 1, device=x.device)[:, None]
        mean = self.value(x).cumsum(1) / tokens
        hidden = hidden + self.out(mean * torch.sigmoid(self.gate(x)))
        x = self.mixed_norm(hidden)
        if hasattr(self, "experts"):
            x = x + torch.einsum("btd,edf->btf", x, self.experts)
        return hidden + self.down(F.silu(self.up(x)))


class AveragingForCausalLM(PreTrainedModel, GenerationMixin):
    """What the library asks of a model: `model(input_ids=...)`, logits, where embedding and head are, how it ends."""

    config_class = AveragingConfig

    def __init__(self, config):
        super().__init__(config)
        self.embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(AveragingBlock(config) for _ in range(config.blocks))
        self.norm = nn.RMSNorm(config.hidden_size)
        self.head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def get_input_embeddings(self):
        return self.embedding

    def get_output_embeddings(self):
        return self.head

    def forward(self, input_ids, use_cache=False, **_):
        hidden = self.embedding(input_ids)
        for layer in self.layers:
            hidden = layer(hidden)
        return CausalLMOutput(logits=self.head(self.norm(hidden)))


def main():
    torch.manual_seed(0)
    tokenizer = character_tokenizer()

    # 1. A weight inside a block that is no linear would stay dense and spoil the bits, so the model is refused, with
    # its name and its share. The cure is in the model: one nn.Linear for each expert.
    try:
        find_decoder(AveragingForCausalLM(AveragingConfig(experts=4)))
    except ValueError as refusal:
        print(f"refused: {refusal}\n")

    # 2. Without it the structure is found. Groups share an input, so they share statistics. Roles are a guess from the
    # order and the widths; an empty one only means that the prior on ranks has nothing to say about that linear.
    model = AveragingForCausalLM(AveragingConfig())
    decoder = find_decoder(model)
    block = decoder.blocks[0]
    shapes = {name: linear_shape(block.get_submodule(name)) for name in decoder.linears[0]}
    roles = block_roles(decoder.linears[0], decoder.groups[0], shapes)
    print(f"blocks at {decoder.path}: {len(decoder.blocks)}")
    for group in decoder.groups[0]:
        print(f"  share an input: {', '.join(f'{name} ({roles[name]})' for name in group)}")

    # 3. Then everything works as for any other family.
    config = nanoquant.nanoquant_config(
        bits=1.2,
        budget={"rank_multiple": 8},
        calibration={"windows": 8, "length": 64},
        model={"windows": 32, "batch": 8, "held_out": 4, "compile_from": None},
    )
    report = nanoquant.quantize(model, windows(tokenizer, TRAIN, 50).flatten(), config)
    print(f"\nquantized {len(report.ranks)} linears at {report.bits:.3f} bits a weight")

    # 4. Loading needs one thing more: transformers has to know which class a checkpoint's model_type means. Two lines,
    # in the package that defines the family. The checkpoint itself holds no code.
    AutoConfig.register("averaging", AveragingConfig)
    AutoModelForCausalLM.register(AveragingConfig, AveragingForCausalLM)
    with tempfile.TemporaryDirectory() as folder:
        nanoquant.save_pretrained(model, Path(folder, "out"))
        loaded = nanoquant.load(Path(folder, "out"))
    ids = windows(tokenizer, TRAIN, 2)
    with torch.no_grad():
        same = torch.equal(model(input_ids=ids).logits, loaded(input_ids=ids).logits)
    print(f"the loaded model gives the same logits: {same}")

    # 5. A family of transformers that does not work yet is a bug: add a line for it to FAMILIES of
    # `tests/tiny_models.py`, and the tests of structure, calibration and checkpoints run on it.


if __name__ == "__main__":
    main()
