"""What has to be right before a model is quantized; each check says what it found, or raises what is wrong.

Shapes: a linear is (d_out, d_in). Nothing here reads all weights: a value that is not finite is found by ``quantize``.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

from nanoquant.architectures import find_skeleton_decoder
from nanoquant.benchmark.shapes import linear_shapes, skeleton
from nanoquant.checkpoint_files import StoredTensor, read_headers, shard_files
from nanoquant.compiling import compiler_obstacle
from nanoquant.config import NanoQuantConfig
from nanoquant.disk import check_room, room_of
from nanoquant.importance import Importance
from nanoquant.mapped import map_tensors
from nanoquant.methods import Sizes, body_bits, layer_of, method_of, sizes_summary
from nanoquant.packed_layers import pack_layer
from nanoquant.sizes import tensor_bytes
from nanoquant.sources import check_dense, check_stored, find_model, read_config
from nanoquant.units import amount


def check_files(name: str) -> tuple[Path, str]:
    """The folder of a dense model, complete as far as its headers tell."""
    folder = find_model(name)
    check_dense(folder)
    files = shard_files(folder)
    return folder, f"{len(files)} weight files, {amount(sum(f.stat().st_size for f in files))}"


def check_parts(folder: Path) -> tuple[PreTrainedModel, dict[str, tuple[int, int]], str]:
    """The model without its weights, and the linears that would be quantized."""
    model = skeleton(read_config(folder))
    shapes = linear_shapes(model)
    kinds = len(set(shapes.values()))
    return model, shapes, f"{type(model).__name__}: {len(shapes)} linears of {kinds} shapes"


def check_tensors(folder: Path, model: PreTrainedModel) -> tuple[dict[str, StoredTensor], str]:
    """Stored tensors, which must be those of the model and of a type that can be trained.

    Names that transformers translates while it loads are not compared.
    """
    stored = read_headers(shard_files(folder), None)
    wanted = {name: tuple(p.shape) for name, p in model.named_parameters()}
    other = [n for n in stored.keys() & wanted.keys() if stored[n].shape != wanted[n]]
    if other:
        first = min(other)
        raise ValueError(
            f"{len(other)} tensors have another shape than the config says, {first} is {stored[first].shape} and not "
            f"{wanted[first]}; the weights belong to another config"
        )
    check_stored(stored)
    kinds = Counter(tensor.dtype for tensor in stored.values())
    missing = len(wanted.keys() - stored.keys())
    if missing and not stored.keys() - wanted.keys():
        first = min(wanted.keys() - stored.keys())
        raise ValueError(
            f"{missing} tensors of the model are not stored, {first} is one; copy the model again"
        )
    text = ", ".join(f"{count} in {kind}" for kind, count in kinds.most_common())
    text += " (float16 is going to be bfloat16)" if kinds["F16"] else ""
    return stored, text + (f"; {missing} under other names" if missing else "")


def check_sizes(shapes: dict[str, tuple[int, int]], config: NanoQuantConfig) -> tuple[Sizes, str]:
    """Ranks, or codebooks, that meet the bits."""
    method = method_of(config)
    method.check(shapes, config)
    sizes = method.plan(shapes, config)
    text = f"{body_bits(shapes, sizes):.4f} bits a weight"
    if "codebooks" in (found := sizes_summary(list(sizes.values()))):
        return sizes, f"{text}, codebooks {found['codebooks']}"
    return sizes, f"{text}, ranks {found['least rank']} to {found['largest rank']}"


def check_disk(output: str, model: PreTrainedModel, sizes: Sizes, config: NanoQuantConfig) -> str:
    """Room for the checkpoint, and for what a run writes until then."""
    decoder = find_skeleton_decoder(model)
    chosen = config.block_range(len(decoder.blocks))
    return check_room(output, room_of(model, decoder, chosen, sizes, config))


def check_save(
    stored: dict[str, StoredTensor],
    shapes: dict[str, tuple[int, int]],
    sizes: Sizes,
    config: NanoQuantConfig,
) -> str:
    """Quantize the smallest linear as quickly as it goes, pack it, write it, and read it back."""
    names = [n for n in shapes if f"{n}.weight" in stored]
    if not names:
        raise ValueError(
            "no weight of a linear is stored under its own name; load the model with transformers and save it again"
        )
    name = min(names, key=lambda n: shapes[n][0] * shapes[n][1])
    weight = map_tensors({name: stored[f"{name}.weight"]})[name].float()
    weight = weight if tuple(weight.shape) == shapes[name] else weight.T  # Conv1D
    even = Importance(torch.ones(weight.shape[1]), torch.ones(weight.shape[0]))
    generator = torch.Generator().manual_seed(config.run.seed)
    factors = method_of(config).trial(weight, even, sizes[name], generator)
    layer = pack_layer(layer_of(factors, None), None, torch.bfloat16)
    parts: dict[str, Tensor] = {p: t.detach().contiguous() for p, t in layer.named_parameters()}
    with TemporaryDirectory() as folder:
        file = Path(folder, "layer.safetensors")
        save_file(parts, file)
        found = load_file(file)
    if not all(torch.equal(found[part], tensor) for part, tensor in parts.items()):
        raise ValueError(
            f"{name} is not what was written when it is read back; the disk is damaged"
        )
    return f"{name} {tuple(weight.shape)} as {amount(tensor_bytes(parts.values()))}, read back the same"


def check_extension() -> str:
    """The C++ loops of packed layers on this CPU."""
    from nanoquant_kernels.cpu_build import available_paths

    paths = available_paths()
    if not paths:
        raise ValueError(
            "there is no C++ extension, so packed layers run through plain PyTorch, slower; install c++, g++ or clang++"
        )
    return f"C++ loops for {paths[-1]}"


def check_compiler() -> str:
    """torch.compile for this machine."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    obstacle = compiler_obstacle(device)
    if obstacle:
        raise ValueError(f"{obstacle}; training runs uncompiled, slower")
    return f"torch {torch.__version__} compiles for {device.type}"


def check_gpu() -> str:
    """A GPU, and Triton for it."""
    if not torch.cuda.is_available():
        raise ValueError("torch finds no GPU; everything runs on the CPU")
    from nanoquant_kernels.cards import unavailable

    device = torch.device("cuda")
    name = torch.cuda.get_device_name(device)
    reason = unavailable(device)
    if reason:
        raise ValueError(f"{name}, but nothing runs through Triton: {reason}")
    return f"{name}, {amount(torch.cuda.get_device_properties(device).total_memory)}"
