"""KL divergence and agreement against a dense computation, and what they keep in memory."""

import weakref

import pytest
import torch
from tiny_models import random_windows, tiny_gemma2, tiny_llama
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from nanoquant.evaluation import perplexity as perplexity_module
from nanoquant.evaluation.agreement import agreement
from nanoquant.evaluation.perplexity import perplexity


@pytest.fixture
def windows():
    return random_windows(5, 24)


def noisy(model):
    """The model with noise on its weights, as if it had been quantized."""
    generator = torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.02 * torch.randn(parameter.shape, generator=generator)
    return model


def whole_logits(model, windows):
    with torch.no_grad():
        return model(input_ids=windows, use_cache=False).logits[:, :-1].double()


@pytest.mark.parametrize("build", [tiny_llama, tiny_gemma2])
def test_divergence_and_first_choices_equal_a_dense_computation(build, windows, monkeypatch):
    monkeypatch.setattr(perplexity_module, "CHUNK_ELEMENTS", 128 * 10)
    model, dense = noisy(build()), build()
    found = agreement(model, dense, windows)
    q, p = whole_logits(model, windows), whole_logits(dense, windows)
    kl = F.kl_div(q.log_softmax(-1), p.log_softmax(-1), log_target=True, reduction="none")
    torch.testing.assert_close(found.kl, kl.sum(-1).mean(1), rtol=1e-4, atol=1e-6)
    same = (q.argmax(-1) == p.argmax(-1)).double().mean(1)
    torch.testing.assert_close(found.top1, same, rtol=1e-12, atol=0)
    assert found.kl.mean() > 0.01 and 0 < found.top1.mean() < 1


def test_both_perplexities_are_those_of_the_models_alone(windows):
    model, dense = noisy(tiny_llama()), tiny_llama()
    found = agreement(model, dense, windows)
    for one, alone in ((found.model, model), (found.dense, dense)):
        expected = perplexity(alone, windows)
        torch.testing.assert_close(one.nll, expected.nll, rtol=1e-6, atol=0)
        assert (one.tokens, one.windows) == (expected.tokens, expected.windows)


def test_a_model_agrees_with_itself(windows):
    model = tiny_llama(dtype=torch.bfloat16)
    found = agreement(model, model, windows)
    assert found.kl.abs().max() < 1e-6 and found.top1.min() == 1


def masked(model):
    """The model with token 5 impossible, as models with padded vocabularies have it."""
    head = model.lm_head.forward

    def forward(hidden):
        logits = head(hidden)
        logits[..., 5] = float("-inf")
        return logits

    model.lm_head.forward = forward
    return model


def test_a_token_that_both_models_exclude_adds_nothing(windows):
    model, dense = masked(noisy(tiny_llama())), masked(tiny_llama())
    windows[windows == 5] = 6
    assert agreement(model, dense, windows).kl.isfinite().all()


def test_other_vocabularies_are_refused(windows):
    other = tiny_llama(vocab_size=130)
    with pytest.raises(ValueError, match="vocabularies of 128 and 130 tokens"):
        agreement(tiny_llama(), other, windows)


class LiveBytes(TorchDispatchMode):
    """Bytes of tensors that operators made and that are still there; and the most there ever were."""

    def __init__(self, *models):
        super().__init__()
        self.storages, self.most = {}, 0
        weights = (p for model in models for p in model.parameters())
        self.weights = {weight.untyped_storage()._cdata for weight in weights}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                key = storage._cdata
                if key in self.weights:
                    continue
                self.storages.setdefault(key, (storage.nbytes(), set()))[1].add(id(tensor))
                weakref.finalize(tensor, self.drop, key, id(tensor))
        self.most = max(self.most, sum(size for size, _ in self.storages.values()))
        return out

    def drop(self, key, number):
        if key in self.storages:
            self.storages[key][1].discard(number)
            if not self.storages[key][1]:
                del self.storages[key]


def most_live_bytes(count, length=64):
    model, dense = (tiny_llama(dtype=torch.bfloat16, vocab_size=8192) for _ in range(2))
    windows = random_windows(count, length, vocab=8192)
    with LiveBytes(model, dense) as live:
        agreement(model, dense, windows)
    return live.most


def test_memory_holds_the_logits_of_one_window_and_a_chunk_whatever_the_text(monkeypatch):
    monkeypatch.setattr(perplexity_module, "CHUNK_ELEMENTS", 8192 * 4)
    window = 2 * 64 * 8192 * 2  # bytes of both models' bfloat16 logits
    chunk = 8 * 2 * 8192 * 4  # two tokens, both models: float32 and what is made from it
    one, six = most_live_bytes(1), most_live_bytes(6)
    assert window < one < window + chunk + 200_000
    assert six < one + 10_000
