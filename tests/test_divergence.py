"""The divergence of logits a few tokens at a time: its value, its gradient, and no gradient where none is wanted."""

import needs
import pytest
import torch
from torch.nn import functional as F

from nanoquant.divergence import ForwardKL, divergence_piece, hard_labels, most_probable


@pytest.mark.parametrize("tokens", [5, 128, 300], ids=str)
def test_forward_kl_is_the_divergence_and_its_gradient(tokens):
    generator = torch.manual_seed(0)
    teacher = 3 * torch.randn(tokens, 50, generator=generator)
    student = 3 * torch.randn(tokens, 50, generator=generator)
    x, reference = student.clone().requires_grad_(), student.clone().requires_grad_()
    value = ForwardKL.apply(x, teacher)
    expected = F.kl_div(
        reference.log_softmax(-1), teacher.log_softmax(-1), reduction="batchmean", log_target=True
    )
    torch.testing.assert_close(value, expected)
    (2 * value).backward()
    (2 * expected).backward()
    torch.testing.assert_close(x.grad, reference.grad, rtol=1e-4, atol=1e-7)


def test_no_gradient_is_formed_where_none_is_wanted():
    student, teacher = torch.randn(40, 50), torch.randn(40, 50)
    formed = []

    def piece(*arguments):
        total, gradient = divergence_piece(*arguments)
        formed.append(gradient)
        return total, gradient

    value = ForwardKL.apply(student, teacher, piece)
    assert formed == [None, None]
    assert torch.equal(value, ForwardKL.apply(student.requires_grad_(), teacher, piece).detach())
    assert all(gradient.isfinite().all() for gradient in formed[2:])


def test_forward_kl_of_bfloat16_logits_sums_in_float32():
    generator = torch.manual_seed(0)
    teacher, student = (torch.randn(300, 50, generator=generator).bfloat16() for _ in range(2))
    x = student.clone().requires_grad_()
    value = ForwardKL.apply(x, teacher)
    assert value.dtype == torch.float32
    torch.testing.assert_close(value.detach(), ForwardKL.apply(student.float(), teacher.float()))
    value.backward()
    assert x.grad.dtype == torch.bfloat16


def logits_pair(tokens=70, vocabulary=50, scale=3):
    generator = torch.manual_seed(0)
    return [scale * torch.randn(tokens, vocabulary, generator=generator) for _ in range(2)]


def kept_kl(student, teacher, k):
    first, *more = most_probable(teacher, k)
    return ForwardKL.apply(student, first, divergence_piece, more)


def plain_kept_kl(student, teacher, k):
    """The mean over tokens of the divergence of two distributions over k tokens and one bucket."""
    q, p = student.double().softmax(-1), teacher.double().softmax(-1)
    ids = p.topk(k).indices
    known = torch.zeros_like(p).scatter(-1, ids, 1.0)
    p, q = (torch.cat([x.gather(-1, ids), (x * (1 - known)).sum(-1, True)], -1) for x in (p, q))
    return (p * (p.log() - q.log())).sum(-1).mean()


@pytest.mark.parametrize("k", [1, 5, 49])
def test_a_bucket_has_the_mass_of_all_others_and_its_gradient(k):
    student, teacher = logits_pair()
    x, reference = student.clone().requires_grad_(), student.clone().requires_grad_()
    value, expected = kept_kl(x, teacher, k), plain_kept_kl(reference, teacher, k)
    torch.testing.assert_close(value, expected.float())
    value.backward()
    expected.backward()
    torch.testing.assert_close(x.grad, reference.grad, rtol=1e-4, atol=1e-7)


def test_where_all_tokens_are_kept_it_is_the_whole_divergence():
    student, teacher = logits_pair()
    x, reference = student.clone().requires_grad_(), student.clone().requires_grad_()
    value, expected = kept_kl(x, teacher, 50), ForwardKL.apply(reference, teacher)
    torch.testing.assert_close(value, expected)
    value.backward()
    expected.backward()
    torch.testing.assert_close(x.grad, reference.grad, rtol=1e-4, atol=1e-7)


def test_a_bucket_without_mass_costs_nothing():
    student, teacher = logits_pair()
    teacher[:, 7] = 1e4  # the others underflow
    student[3, 9] = 1e3  # and of this one all but the bucket do
    x = student.clone().requires_grad_()
    value = kept_kl(x, teacher, 1)
    value.backward()
    expected = F.cross_entropy(student, torch.full((70,), 7))
    torch.testing.assert_close(value.detach(), expected)
    torch.testing.assert_close(x.grad.sum(-1), torch.zeros(70), atol=1e-6, rtol=0)


def test_a_student_of_bfloat16_learns_from_what_is_kept_in_its_own_dtype():
    student, teacher = (x.bfloat16() for x in logits_pair())
    x = student.clone().requires_grad_()
    value = kept_kl(x, teacher, 5)
    torch.testing.assert_close(value.detach(), kept_kl(student.float(), teacher.float(), 5))
    value.backward()
    assert value.dtype == torch.float32 and x.grad.dtype == torch.bfloat16


@needs.compiler
def test_a_compiled_piece_computes_the_same_from_what_is_kept():
    student, teacher = logits_pair(tokens=32)
    first, *more = most_probable(teacher, 5)
    total, slope = divergence_piece(student, first, 32, more)
    fast_total, fast_slope = torch.compile(divergence_piece)(student, first, 32, more)
    torch.testing.assert_close(fast_total, total)
    torch.testing.assert_close(fast_slope, slope, rtol=1e-4, atol=1e-7)


WINDOWS = torch.randint(50, (5, 14), generator=torch.manual_seed(1))


def test_hard_labels_are_next_tokens_and_the_last_token_of_a_window_has_none():
    labels, share = hard_labels(WINDOWS, 0.3)
    labels, share = labels.view(5, 14), share.view(5, 14)
    assert torch.equal(labels[:, :-1], WINDOWS[:, 1:])
    assert torch.equal(share[:, :-1], torch.full((5, 13), 0.3)) and not share[:, -1].any()


@pytest.mark.parametrize("k", [None, 5])
@pytest.mark.parametrize("share", [0.2, 0.9])
def test_hard_labels_take_their_share_of_the_divergence_and_of_its_gradient(share, k):
    student, teacher = logits_pair()
    x, reference = student.clone().requires_grad_(), student.clone().requires_grad_()
    first, *more = (teacher,) if k is None else most_probable(teacher, k)
    labels, shares = hard_labels(WINDOWS, share)
    value = ForwardKL.apply(x, first, divergence_piece, more, (labels, shares))
    soft = torch.stack(
        [
            F.kl_div(q.log_softmax(-1), p.log_softmax(-1), reduction="sum", log_target=True)
            if k is None
            else plain_kept_kl(q[None], p[None], k)
            for q, p in zip(reference, teacher, strict=True)
        ]
    )
    own = F.cross_entropy(reference, labels.flatten(), reduction="none")
    expected = ((1 - shares.flatten()) * soft + shares.flatten() * own).mean().float()
    torch.testing.assert_close(value, expected)
    value.backward()
    expected.backward()
    torch.testing.assert_close(x.grad, reference.grad, rtol=1e-4, atol=1e-7)


@needs.compiler
@pytest.mark.parametrize("k", [None, 5])
def test_a_compiled_piece_computes_the_same_with_hard_labels(k):
    student, teacher = (x[:28] for x in logits_pair())
    first, *more = (teacher,) if k is None else most_probable(teacher, k)
    arguments = student, first, 28, tuple(more), hard_labels(WINDOWS[:2], 0.3)
    total, slope = divergence_piece(*arguments)
    fast_total, fast_slope = torch.compile(divergence_piece)(*arguments)
    torch.testing.assert_close(fast_total, total)
    torch.testing.assert_close(fast_slope, slope, rtol=1e-4, atol=1e-7)
