"""The divergence of logits a few tokens at a time: its value, its gradient, and no gradient where none is wanted."""

import pytest
import torch
from torch.nn import functional as F

from nanoquant.divergence import ForwardKL, divergence_piece


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
