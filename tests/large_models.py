"""Synthetic models on the disk that are larger than what a test may hold, written block by block."""

import json
from pathlib import Path

import torch
import transformers as tf
from safetensors.torch import save_file
from tiny_models import VOCAB, tiny_tokenizer


def write_llama(folder: Path, layers=80, hidden=1024, intermediate=3584, heads=8, pairs=1):
    """A Llama with the 70B's structure (80 blocks, 8 heads of queries to one of keys) and an eighth of its width.

    Returns:
        Bytes of its weights, and of one block: 2.1 GB and 27 MB with the default sizes.
    """
    config = tf.LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=pairs,
        max_position_embeddings=512,
        tie_word_embeddings=False,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
        dtype="bfloat16",
        architectures=["LlamaForCausalLM"],
    )
    folder.mkdir(parents=True)
    config.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    with torch.device("meta"):
        shapes = {
            n: p.shape for n, p in tf.AutoModelForCausalLM.from_config(config).named_parameters()
        }
    first = [name for name in shapes if ".layers." not in name]
    parts = [first] + [[n for n in shapes if f".layers.{b}." in n] for b in range(layers)]
    generator, weight_map, sizes = torch.Generator().manual_seed(0), {}, []
    for number, names in enumerate(parts):
        file = f"model-{number:05}.safetensors"
        tensors = {name: _random(shapes[name], generator) for name in names}
        save_file(tensors, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(names, file)
        sizes.append(sum(tensor.nbytes for tensor in tensors.values()))
    index = {"metadata": {"total_size": sum(sizes)}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return sum(sizes), sizes[1]


def _random(shape, generator):
    """A weight that keeps the size of its input; a norm's is 1."""
    if len(shape) == 1:
        return torch.ones(shape, dtype=torch.bfloat16)
    return (torch.randn(shape, generator=generator) * shape[-1] ** -0.5).to(torch.bfloat16)
