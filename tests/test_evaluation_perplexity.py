import math

import pytest
import torch
from tiny_models import random_windows, tiny_gemma2, tiny_llama
from torch.nn import functional as F

from nanoquant.evaluation import perplexity as module
from nanoquant.evaluation.perplexity import negative_log_likelihood, perplexity


@pytest.fixture
def windows():
    return random_windows(5, 24)


def reference_nll(model, windows):
    with torch.no_grad():
        logits = model(input_ids=windows, use_cache=False).logits[:, :-1].double()
    losses = F.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten(), reduction="none")
    return losses.view(len(windows), -1).sum(1)


@pytest.mark.parametrize("build", [tiny_llama, tiny_gemma2])
def test_likelihood_equals_cross_entropy(build, windows):
    model = build()
    nll, count = negative_log_likelihood(model, windows, batch_size=2)
    assert count == 5 * 23 and nll.dtype == torch.float64
    torch.testing.assert_close(nll, reference_nll(model, windows), rtol=1e-5, atol=0)


def test_perplexity_is_exp_of_the_mean(windows):
    model = tiny_llama()
    result = perplexity(model, windows)
    mean = reference_nll(model, windows).sum().item() / result.tokens
    assert result.value == pytest.approx(math.exp(mean), rel=1e-5)
    assert (result.tokens, result.windows, len(result.nll)) == (115, 5, 5)


def test_chunks_and_batches_do_not_change_the_result(windows, monkeypatch):
    model = tiny_llama()
    whole = perplexity(model, windows)
    monkeypatch.setattr(module, "CHUNK_ELEMENTS", 128 * 5)
    parts = perplexity(model, windows, 3)
    torch.testing.assert_close(whole.nll, parts.nll, rtol=1e-5, atol=0)


def test_no_more_than_a_chunk_is_converted_to_float32(windows, monkeypatch):
    sizes = []
    monkeypatch.setattr(module, "CHUNK_ELEMENTS", 128 * 5)
    inner = module.log_sum_exp
    monkeypatch.setattr(
        module, "log_sum_exp", lambda z, *a: (sizes.append(z.numel()), inner(z, *a))[1]
    )
    perplexity(tiny_llama(dtype=torch.bfloat16), windows, batch_size=5)
    assert max(sizes) == 128 * 5


def test_logits_that_are_not_finite_name_the_window(windows):
    model = tiny_llama(tie=False)
    with torch.no_grad():
        model.model.embed_tokens.weight[windows[2, 3]] = float("nan")
    with pytest.raises(ValueError, match="logits of the model are not finite in window"):
        perplexity(model, windows)


def test_progress_counts_windows(windows):
    calls = []
    perplexity(tiny_llama(), windows, 2, lambda done, total: calls.append((done, total)))
    assert calls == [(2, 5), (4, 5), (5, 5)]


def test_windows_of_one_token_are_refused():
    with pytest.raises(ValueError, match=r"shape \(3, 1\)"):
        perplexity(tiny_llama(), random_windows(3, 1))


def test_mode_and_gradients_are_left_alone(windows):
    model = tiny_llama().train()
    perplexity(model, windows)
    assert model.training and all(p.grad is None for p in model.parameters())


def test_windows_longer_than_the_positions_are_refused():
    model = tiny_llama()
    model.config.max_position_embeddings = 16
    with pytest.raises(ValueError, match="windows of 24 tokens .* 16 positions"):
        perplexity(model, random_windows(1, 24))
