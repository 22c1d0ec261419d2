"""The command that makes or loads what is recommended, whoever's format it is."""

from __future__ import annotations

import json
import shlex

from nanoquant.advice.catalogue import HUB
from nanoquant.advice.options import Option

AQLM_HUB = {
    "llama-2-7b": "ISTA-DASLab/Llama-2-7b-AQLM-PV-2Bit-1x16-hf",
    "llama-2-13b": "ISTA-DASLab/Llama-2-13b-AQLM-PV-2Bit-1x16-hf",
    "llama-2-70b": "ISTA-DASLab/Llama-2-70b-AQLM-PV-2Bit-1x16-hf",
    "llama-3-8b": "ISTA-DASLab/Meta-Llama-3-8B-AQLM-PV-2Bit-1x16",
    "llama-3-70b": "ISTA-DASLab/Meta-Llama-3-70B-AQLM-PV-2Bit-1x16",
}
"""Ready-made checkpoints; making one takes a day on an A100 for 7B."""
PRESET = "best"
"""The best measured preset of this library."""

INT8 = ("torchao.quantization", "Int8WeightOnlyConfig", "")
INT4 = {
    "cuda": (
        "torchao.quantization",
        "Int4WeightOnlyConfig",
        ', int4_packing_format="tile_packed_to_4d"',
    ),
    "cpu": ("torchao.prototype.quantization.int4", "PrototypeInt4WeightOnlyConfig", ""),
}
"""Module, config and further arguments of torchao for int4; its layouts for GPUs and CPUs are two."""


def command_for(option: Option, source: str, published: str | None, device: str) -> str:
    """A command of the shell, for the environment of this library unless it says otherwise.

    Args:
        option: what is recommended.
        source: folder or Hub name of the dense model.
        published: the published model that it is, for ready-made checkpoints.
        device: "cpu" or "cuda".
    """
    if option.tool == "nanoquant":
        return _ours(option, source)
    return f"python -c {shlex.quote(python_for(option, source, published, device))}"


def python_for(option: Option, source: str, published: str | None, device: str) -> str:
    """Python that loads a model in the format of another library."""
    if option.tool == "aqlm":
        return "# pip install aqlm[gpu]\n" + _load(AQLM_HUB[published], device)
    if option.tool == "gptq":
        text = json.dumps(source)
        made = f'GPTQConfig(bits=2, group_size=64, dataset="c4", tokenizer={text})'
        head = "# pip install gptqmodel optimum\nfrom transformers import GPTQConfig\n"
        return head + _load(source, device, made)
    if option.tool == "torchao":
        module, name, more = INT8 if option.key == "int8" else INT4[device]
        arguments = f"group_size={option.group}{more}" if option.group else ""
        head = f"from {module} import {name}\nfrom transformers import TorchAoConfig\n"
        return head + _load(source, device, f"TorchAoConfig({name}({arguments}))")
    return _load(source, device)


def _load(source: str, device: str, quantization: str = "") -> str:
    """Lines that load a model by transformers."""
    arguments = [json.dumps(source), 'dtype="auto"' if quantization == "" else 'dtype="bfloat16"']
    arguments += ['device_map="cuda"'] if device == "cuda" else []
    arguments += [f"quantization_config={quantization}"] if quantization else []
    return (
        "from transformers import AutoModelForCausalLM\n"
        f"model = AutoModelForCausalLM.from_pretrained({', '.join(arguments)})"
    )


def _ours(option: Option, source: str) -> str:
    """The command of this library."""
    words = ["nanoquant", "quantize", source, "OUT", "--text", "TEXT", "--bits", f"{option.bits}"]
    words += ["--preset", PRESET]
    words += [] if option.method == "binary" else ["--method", option.method]
    words += [] if option.embedding == 16 else ["--embedding.bits", f"{option.embedding}"]
    return shlex.join(words)


def hub_name(published: str, post_trained: bool) -> str:
    """Where a published model is: its base version, or the one for chat."""
    name = HUB[published]
    if not post_trained or name.endswith("-Instruct"):
        return name
    if name.startswith("Qwen/"):
        return name.removesuffix("-Base")
    for base, chat in (("-pt", "-it"), ("-hf", "-chat-hf")):
        if name.endswith(base):
            return name.removesuffix(base) + chat
    return f"{name}-Instruct"
