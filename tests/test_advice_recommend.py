"""What is recommended, on cases that a careful practitioner would agree with."""

import pytest

from nanoquant.advice.catalogue import find
from nanoquant.advice.config import AdviceConfig
from nanoquant.advice.recommend import advise
from nanoquant.advice.rules import RULES

CASES = [
    # model, memory, task, context, device -> recommended (model, key, embedding), the model itself
    ("llama-2-7b", "24GB", "chat", 4096, "cuda", ("llama-2-7b", "bf16", 16), ("bf16", 16)),
    ("llama-2-7b", "8GB", "math", 4096, "cuda", ("llama-2-7b", "int4-g64", 16), ("int4-g64", 16)),
    ("llama-2-7b", "12GB", "math", 4096, "cuda", ("llama-2-7b", "int8", 16), ("int8", 16)),
    ("llama-2-7b", "4GB", "code", 4096, "cpu", None, ("1.0", 8)),
    ("llama-2-70b", "8GB", "chat", 4096, "cuda", ("llama-2-7b", "int4-g64", 16), ("0.55", 8)),
    ("llama-2-70b", "24GB", "chat", 4096, "cuda", ("llama-2-70b", "aqlm", 16), ("aqlm", 16)),
    ("llama-2-70b", "24GB", "math", 4096, "cuda", ("llama-2-13b", "int8", 16), ("aqlm", 16)),
    ("llama-2-70b", "24GB", "chat", 4096, "cpu", ("llama-2-13b", "int8", 16), ("2.0", 16)),
    ("llama-2-70b", "4GB", "chat", 2048, "cuda", ("llama-2-7b", "aqlm", 16), None),
    ("qwen3-8b", "4GB", "math", 4096, "cuda", ("qwen3-1.7b", "int8", 16), ("2.0", 4)),
    ("qwen3-8b", "5GB", "chat", 4096, "cpu", ("qwen3-4b", "int4-g64", 16), ("2.0", 8)),
    ("qwen3-8b", "24GB", "code", 4096, "cuda", ("qwen3-8b", "bf16", 16), ("bf16", 16)),
    ("qwen3-0.6b", "500MB", "chat", 512, "cpu", ("qwen3-0.6b", "2.0", 8), ("2.0", 8)),
    ("qwen3-0.6b", "270MB", "chat", 512, "cpu", ("qwen3-0.6b", "1.0", 4), ("1.0", 4)),
    ("qwen3-0.6b", "500MB", "math", 512, "cpu", None, ("2.0", 8)),
    ("demo", "100MB", "chat", 512, "cpu", ("demo", "2.0", 8), ("2.0", 8)),
    ("demo", "100MB", "chat", 4096, "cpu", None, None),
    ("gemma-3-4b", "7GB", "chat", 8192, "cuda", ("gemma-3-4b", "int8", 16), ("int8", 16)),
    ("llama-3.1-8b", "48GB", "long-context", 100000, "cuda", ("llama-3.1-8b", "bf16", 16), ("bf16", 16)),
    ("llama-3.1-8b", "38GB", "long-context", 100000, "cuda", ("llama-3.1-8b", "int8", 16), ("int8", 16)),
]  # fmt: skip


def advice_on(model, memory, task="chat", context=None, device="cuda", **more):
    config = AdviceConfig(memory=memory, task=task, context=context, device=device, **more)
    named = find(model)
    use = config.use(named.config.max_position_embeddings, model)
    return advise(named, task, use, config.bytes())


def named_rules(advice):
    return {rule.name for rule in advice.rules}


@pytest.mark.parametrize(
    ("model", "memory", "task", "context", "device", "expected", "itself"),
    CASES,
    ids=[f"{case[0]}-{case[1]}-{case[2]}-{case[4]}" for case in CASES],
)
def test_recommended(model, memory, task, context, device, expected, itself):
    advice = advice_on(model, memory, task, context, device)
    found, own = (choice and choice.row for choice in (advice.recommended, advice.itself))
    assert (found and (found.model, found.option.key, found.option.embedding)) == expected
    assert (own and (own.option.key, own.option.embedding)) == itself
    assert found is None or found.cost.total <= advice.memory
    assert found is None or task == "chat" or found.careful
    assert advice.reasons


def test_a_large_model_below_one_bit_comes_with_its_warnings_and_a_better_choice():
    advice = advice_on("llama-2-70b", "8GB")
    assert advice.itself.row.fits == "tight"
    assert named_rules(advice) >= {
        "a smaller model at more bits often wins",
        "one bit costs much accuracy",
        "below 1 bit, take the next smaller model",
        "making it takes the dense model",
    }
    assert "--bits 0.55 --preset best --embedding.bits 8" in advice.itself.command
    said = " ".join(advice.reasons)
    assert "llama-2-70b does not fit at 4 bits or more" in said
    assert "has 9.82 by the protocol in which llama-2-7b has 5.6 at int4" in said


def test_a_larger_model_wins_only_by_figures_of_one_protocol():
    advice = advice_on("llama-2-70b", "24GB")
    assert "it has perplexity 3.78, and llama-2-13b in bf16 4.57" in " ".join(advice.reasons)


def test_ready_made_base_checkpoints_are_not_offered_for_post_trained_models():
    base, chat = (advice_on(f"meta-llama/Llama-2-70b-{kind}", "24GB") for kind in ("hf", "chat-hf"))
    assert base.table.row("aqlm") is not None and chat.table.row("aqlm") is None
    assert "Llama-2-13b-chat-hf" in chat.recommended.command
    assert "this model is post-trained" in named_rules(chat) - named_rules(base)


def test_tasks_bring_their_rule():
    for task in ("math", "code", "long-context"):
        assert any(
            task.split("-")[0] in rule for rule in named_rules(advice_on("demo", "1GB", task))
        )
    assert not any("needs" in rule for rule in named_rules(advice_on("demo", "1GB")))


def test_long_context_makes_the_cache_the_problem_and_8_bits_of_cache_half_of_it():
    advice = advice_on("llama-3.1-8b", "24GB", context=131072)
    assert "the cache takes more than the weights" in named_rules(advice)
    half = advice_on("llama-3.1-8b", "24GB", context=131072, cache_bits=8)
    assert 2 * half.table.rows[0].cost.cache == advice.table.rows[0].cost.cache


def test_sliding_windows_keep_the_cache_small():
    gemma, llama = (
        advice_on(name, "24GB", context=32768).table for name in ("gemma-3-4b", "llama-3.2-3b")
    )
    assert gemma.rows[0].cost.cache < llama.rows[0].cost.cache / 4


def test_what_groups_leave_dense_and_what_layouts_pad_is_said():
    assert "groups must divide rows" in named_rules(advice_on("demo", "1GB", device="cpu"))
    assert "groups must divide rows" not in named_rules(advice_on("llama-2-7b", "1GB"))
    assert "int4 for GPUs fills rows up" in named_rules(advice_on("qwen3-4b", "8GB"))
    assert "int4 for GPUs fills rows up" not in named_rules(
        advice_on("qwen3-4b", "8GB", device="cpu")
    )


def test_where_nothing_fits_the_smallest_and_what_would_fit_is_said():
    said = " ".join(advice_on("demo", "100MB", device="cpu").reasons)
    assert "the smallest, nanoquant 0.55 bit, embedding 4, takes 17" in said
    assert "With --context 2" in said


def test_a_sibling_that_fits_without_room_is_named_with_the_context_that_gives_it():
    said = " ".join(advice_on("qwen3-8b", "4GB", "math").reasons)
    assert "qwen3-4b fits too, without room: int4" in said and "with --context 27" in said


def test_a_larger_sibling_that_fits_is_named():
    said = " ".join(advice_on("llama-2-7b", "24GB").reasons)
    assert "nanoquant is not needed here" in said
    assert "llama-2-13b fits as well, at int8" in said and "is 4.88 against 5.47" in said


def test_more_bits_without_room_are_said_to_be_so():
    said = " ".join(advice_on("gemma-3-4b", "6GB", context=8192).reasons)
    assert "More bits: int8 takes 5.5" in said and "would leave no room" in said


def test_every_rule_applies_somewhere_and_names_a_source():
    cases = [case[:5] for case in CASES]
    cases += [
        ("qwen3-4b", "8GB"),
        ("Qwen/Qwen3-8B", "4GB"),
        ("llama-2-7b", "5GB", "chat", None, "cpu"),
    ]
    cases += [("llama-3.1-8b", "24GB", "chat", 131072)]
    found = {rule.name: rule for case in cases for rule in advice_on(*case).rules}
    assert len(found) == len(RULES)
    assert all(rule.source and rule.text for rule in found.values())
