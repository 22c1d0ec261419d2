"""Text that a model writes itself is drawn from its own probabilities."""

import pytest
import torch
from tiny_models import FAMILIES, random_windows, tiny_llama

from nanoquant.sampling import LOOK_BACK, LOOK_EVERY, Sampling, loops, sample


class Fixed(torch.nn.Module):
    """A tiny model whose logits after a token are those of a table (V, V)."""

    def __init__(self, table):
        super().__init__()
        self.table, inner = table, tiny_llama()
        self.inner, self.config = inner, inner.config

    def get_input_embeddings(self):
        return self.inner.get_input_embeddings()

    def forward(self, input_ids, **_):
        return type("Out", (), {"logits": self.table[input_ids[:, -1:]]})


def chances(rows, count, seed=0):
    return torch.rand(rows, count, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("family", FAMILIES)
def test_tokens_are_those_of_a_forward_pass_without_a_cache(family):
    model, given = FAMILIES[family](), random_windows(3, 4)
    numbers, how = chances(3, 20), Sampling(temperature=0.7)
    rows, steps = given, []
    with torch.no_grad():
        for step in range(20):
            sums = torch.softmax(model(rows).logits[:, -1] / 0.7, -1).cumsum(-1)
            below = (sums <= numbers[:, step, None] * sums[:, -1:]).sum(-1, keepdim=True)
            rows = torch.cat([rows, below], 1)
    new = sample(model, given, numbers, how, steps.append)
    assert torch.equal(new, rows[:, 4:]) and steps == [3] * 20


def test_frequencies_are_the_models_probabilities():
    table = torch.randn(128, 128, generator=torch.Generator().manual_seed(1))
    given, count = torch.full((20_000, 1), 5), 20_000
    new = sample(Fixed(table), given, chances(count, 1), Sampling(temperature=2.0))
    shares = torch.bincount(new[:, 0], minlength=128) / count
    wanted = torch.softmax(table[5] / 2, -1)
    assert (shares - wanted).abs().max() < 5 * (wanted.max() / count).sqrt()


def test_the_first_token_may_be_even_among_the_most_probable_ones():
    table = torch.arange(128.0).expand(128, 128)
    new = sample(Fixed(table), torch.full((3000, 1), 5), chances(3000, 2), Sampling(1.0, first=4))
    found, times = new[:, 0].unique(return_counts=True)
    assert found.tolist() == [124, 125, 126, 127] and (times - 750).abs().max() < 150
    assert (new[:, 1] == 127).float().mean() > 0.6


def test_an_end_is_followed_by_the_next_text_which_is_not_empty():
    table = torch.zeros(128, 128)
    table[:, 2] = 6.0  # the end token is likely everywhere
    plain = sample(Fixed(table), torch.full((8, 1), 5), chances(8, 40), Sampling(1.0, (2,)))
    after = plain[:, 1:][plain[:, :-1] == 2]
    assert (plain == 2).any() and (after != 2).all()
    how = Sampling(1.0, (2, 7), begin=1)
    begun = sample(Fixed(table), torch.full((8, 1), 5), chances(8, 40), how)
    ends = (begun == 2) | (begun == 7)
    assert (begun[:, 1:][ends[:, :-1]] == 1).all()
    assert not ends[:, 1:][begun[:, :-1] == 1].any()


def test_ids_that_the_tokenizer_lacks_are_never_drawn():
    new = sample(
        Fixed(torch.zeros(128, 128)),
        torch.full((50, 1), 5),
        chances(50, 20),
        Sampling(1.0, known=100),
    )
    assert new.max() == 99 and new.min() == 0


def test_a_loop_is_ended():
    table = torch.zeros(128, 128)
    for token, following in ((10, 11), (11, 12), (12, 10), (2, 40), (40, 10)):
        table[token, following] = 200.0
    count = LOOK_BACK + 3 * LOOK_EVERY
    new = sample(Fixed(table), torch.tensor([[10]]), chances(1, count), Sampling(1.0, (2,)))[0]
    assert new[LOOK_BACK].item() == 2 and new[LOOK_BACK + 1 : LOOK_BACK + 4].tolist() == [
        40,
        10,
        11,
    ]
    endless = sample(Fixed(table), torch.tensor([[10]]), chances(1, count), Sampling(1.0))[0]
    assert set(endless.tolist()) == {10, 11, 12}


def test_repetition_with_any_period_up_to_a_third_is_a_loop():
    tails = [torch.arange(96) % period for period in (1, 7, 32, 33)]
    assert loops(torch.stack(tails)).tolist() == [True, True, True, False]
    tails[0] = tails[0].clone().index_fill(0, torch.tensor([50]), 3)
    assert not loops(tails[0][None]).any()


def test_logits_that_are_not_finite_are_no_text():
    with pytest.raises(FloatingPointError, match="not finite"):
        sample(
            Fixed(torch.full((128, 128), float("nan"))),
            torch.tensor([[5]]),
            chances(1, 3),
            Sampling(1.0),
        )
