"""The files of an adapter, for fuzz_readers: each is damaged while the others stay whole."""

import copy
import os

import torch
from packed_models import pack_randomly
from peft import LoraConfig, get_peft_model
from tiny_models import tiny_llama

from nanoquant.adapters import load_adapter, save_adapter


def adapter_files(folder):
    """Contents by name, and what reads one of them: called with its place, it puts the others beside it."""
    torch.manual_seed(0)
    model = tiny_llama()
    pack_randomly(model)
    adapted = get_peft_model(copy.deepcopy(model), LoraConfig(r=4, target_modules="all-linear"))
    save_adapter(adapted, folder)
    contents = {file.name: file.read_bytes() for file in folder.iterdir() if file.suffix != ".md"}

    def read(file):
        for name, content in contents.items():
            if not os.path.lexists(file.with_name(name)):
                file.with_name(name).write_bytes(content)
        load_adapter(copy.deepcopy(model), file.parent)

    return contents, read
