"""Whatever reads all dense weights before the whole-model phase gives their memory back."""

from pathlib import Path

import pytest
import torch
from tiny_models import random_windows, tiny_llama

from nanoquant.activations import Activations
from nanoquant.architectures import find_decoder
from nanoquant.calibration import collect_importances
from nanoquant.decoder import forgetting
from nanoquant.dense_prefix import DensePrefix
from nanoquant.digest import model_digest
from nanoquant.evaluation.perplexity import perplexity
from nanoquant.importance import ImportanceConfig
from nanoquant.mapped import forget
from nanoquant.quantize import check_finite
from nanoquant.sources import load_model

IDS = random_windows(2, 8)
SMAPS = Path("/proc/self/smaps")

pytestmark = pytest.mark.skipif(not SMAPS.is_file(), reason="the system tells no maps")


def resident(folder):
    """Bytes of the files of a folder that are mapped and in memory."""
    total, inside = 0, False
    for line in SMAPS.read_text().splitlines():
        if not line.split(" ")[0].endswith(":"):
            inside = str(folder) in line
        elif inside and line.startswith("Rss:"):
            total += 1024 * int(line.split()[1])
    return total


def evaluate(model, decoder):
    with forgetting(model, decoder.blocks):
        perplexity(model, IDS)


USES = {
    "check_finite": lambda model, decoder: check_finite(model),
    "model_digest": lambda model, decoder: model_digest(model),
    "find_decoder": lambda model, decoder: find_decoder(model),
    "importances": lambda m, d: collect_importances(m, d, IDS, ImportanceConfig()),
    "dense prefix": lambda model, decoder: DensePrefix(model, decoder, IDS).logits_from(1),
    "block inputs": lambda model, decoder: Activations(model, decoder, IDS),
    "perplexity": evaluate,
}


@pytest.fixture(scope="module")
def mapped_model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mapped")
    sizes = {"hidden_size": 512, "intermediate_size": 1024, "num_key_value_heads": 4}
    tiny_llama(layers=3, vocab_size=1024, **sizes).save_pretrained(folder)
    model = load_model(folder, torch.device("cpu"))
    return model, find_decoder(model), folder


def test_a_forward_pass_alone_keeps_all_weights_in_memory(mapped_model):
    model, _, folder = mapped_model
    model(IDS)
    assert resident(folder) > 0.9 * sum(p.nbytes for p in model.parameters())


@pytest.mark.parametrize("use", USES)
def test_weights_are_forgotten_after_use(use, mapped_model):
    model, decoder, folder = mapped_model
    forget(model.parameters())
    USES[use](model, decoder)
    assert resident(folder) < 0.1 * sum(p.nbytes for p in model.parameters())
