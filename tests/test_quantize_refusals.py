"""What quantize refuses from Python, before any work, and what to do about it."""

import dataclasses

import pytest
import torch
from test_quantize import QUICK, TINY, TOKENS, packed_layers
from tiny_models import tiny_llama

from nanoquant.embedding import EmbeddingConfig
from nanoquant.quantize import quantize
from nanoquant.training import RunConfig


def test_a_quantized_model_is_refused():
    model = tiny_llama()
    quantize(model, TOKENS, QUICK)
    with pytest.raises(ValueError):
        quantize(model, TOKENS, QUICK)


def test_blocks_beyond_the_model_are_refused():
    with pytest.raises(ValueError, match="chooses none of the 2"):
        quantize(tiny_llama(), TOKENS, dataclasses.replace(TINY, blocks="5:9"))


def test_steps_belong_to_torchaos_quantize():
    with pytest.raises(ValueError, match="step"):
        quantize(tiny_llama(), TOKENS, dataclasses.replace(TINY, step="prepare"))


def test_tokens_that_the_model_does_not_know_are_refused_before_work():
    with pytest.raises(ValueError, match=r"token 500, but the model knows 128"):
        quantize(tiny_llama(), torch.full_like(TOKENS, 500), TINY)
    model, last = tiny_llama(), TOKENS.clone()
    last[-1] = 500  # in a held-out window
    with pytest.raises(ValueError, match=r"token 500, but the model knows 128"):
        quantize(model, last, TINY)
    assert not packed_layers(model)


def test_windows_longer_than_the_positions_are_refused_before_work():
    model = tiny_llama()
    model.config.max_position_embeddings = 15
    with pytest.raises(ValueError, match="windows of 16 tokens .* 15 positions"):
        quantize(model, TOKENS, TINY)


def test_float16_models_are_refused_with_what_to_load_instead():
    with pytest.raises(ValueError, match=r"float16.*bfloat16"):
        quantize(tiny_llama(dtype=torch.float16), TOKENS, TINY)


def test_a_model_without_generation_config_is_refused_with_what_to_inherit():
    model = tiny_llama()
    del model.generation_config
    with pytest.raises(
        ValueError, match="LlamaForCausalLM has no generation_config.*GenerationMixin"
    ):
        quantize(model, TOKENS, TINY)


def test_full_precision_is_refused_on_a_bfloat16_model():
    run = RunConfig(accelerator="cpu", precision="32-true")
    with pytest.raises(ValueError, match="32-true needs a float32 model"):
        quantize(tiny_llama(dtype=torch.bfloat16), TOKENS, dataclasses.replace(TINY, run=run))


def test_a_precision_that_would_cast_latents_is_refused():
    with pytest.raises(ValueError, match="bf16-mixed or 32-true"):
        RunConfig(precision="bf16-true")


def test_groups_that_do_not_fit_the_embedding_are_refused_before_work():
    model = tiny_llama()
    config = dataclasses.replace(QUICK, embedding=EmbeddingConfig(bits=4, group_size=96))
    with pytest.raises(ValueError, match="does not divide the 64 columns"):
        quantize(model, TOKENS, config)
    assert not packed_layers(model)
