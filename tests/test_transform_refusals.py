"""What torchao's quantize_ can't do with a NanoQuantConfig is refused by name, with what to do instead."""

import dataclasses

import pytest
import torch
from test_transform import CONFIG, CONVERT, PREPARE, two_layers
from tiny_models import tiny_llama
from torch import nn
from torchao.quantization import quantize_

from nanoquant.budget import BudgetConfig
from nanoquant.config import NanoQuantConfig
from nanoquant.embedding import EmbeddingConfig


def test_a_linear_that_saw_nothing_is_an_error_that_names_its_shape():
    model = two_layers()
    quantize_(model, PREPARE)
    model[0](torch.randn(4, 64)).sum().backward()
    with pytest.raises(
        ValueError, match=r"shape \(48, 96\) has no statistics of its inputs and output"
    ):
        quantize_(model, CONVERT)


def test_forward_passes_alone_are_not_enough():
    model = two_layers()
    quantize_(model, PREPARE)
    model(torch.randn(4, 64))
    with pytest.raises(ValueError, match=r"output gradients: .*call loss\.backward\(\)"):
        quantize_(model, CONVERT)
    with torch.no_grad():
        model(torch.randn(4, 64))
    with pytest.raises(ValueError, match=r"loss\.backward\(\)"):
        quantize_(model, CONVERT)


def test_convert_without_prepare_is_an_error():
    with pytest.raises(ValueError, match=r"shape \(96, 64\) has no statistics.*step='prepare'"):
        quantize_(two_layers(), CONVERT)


def test_a_prepared_linear_is_not_quantized_without_its_statistics():
    model = two_layers()
    quantize_(model, PREPARE)
    with pytest.raises(ValueError, match="step='convert'"):
        quantize_(model, CONFIG)


def test_a_shape_that_costs_more_than_the_budget_is_an_error_with_a_way_out():
    model = nn.Sequential(nn.Linear(64, 64))
    config = dataclasses.replace(CONFIG, budget=BudgetConfig(bits=1.0))
    with pytest.raises(
        ValueError, match=r"shape \(64, 64\).*rank 32 takes 1\.5000 bits.*filter_fn"
    ):
        quantize_(model, config)
    quantize_(model, config, filter_fn=lambda module, name: False)


def test_blocks_and_other_modules_are_refused():
    with pytest.raises(ValueError, match="filter_fn"):
        quantize_(two_layers(), dataclasses.replace(CONFIG, blocks="0:1"))
    with pytest.raises(ValueError, match="ReLU"):
        quantize_(two_layers(), CONFIG, filter_fn=lambda module, name: isinstance(module, nn.ReLU))

    class Special(nn.Linear):
        pass

    with pytest.raises(ValueError, match="Special"):
        quantize_(nn.Sequential(Special(64, 64)), PREPARE)


def test_non_finite_weights_and_activations_are_named():
    model = two_layers()
    model[0].weight.data[0, 0] = float("inf")
    with pytest.raises(ValueError, match="non-finite"):
        quantize_(model, CONFIG)
    model = two_layers()
    quantize_(model, PREPARE)
    with pytest.raises(ValueError, match=r"input activations of linear of shape \(96, 64\)"):
        model(torch.full((2, 64), float("nan")))


def test_bits_of_the_embedding_are_refused_with_what_to_call_instead():
    config = NanoQuantConfig(embedding=EmbeddingConfig(bits=8))
    with pytest.raises(ValueError, match=r"embedding.bits=8.*nanoquant.quantize_embeddings"):
        quantize_(tiny_llama(), config)


def test_a_prior_over_depth_belongs_to_quantize():
    config = NanoQuantConfig(budget=BudgetConfig(allocation="prior"))
    with pytest.raises(ValueError, match=r"allocation=prior.*nanoquant\.quantize on"):
        quantize_(tiny_llama(), config)
