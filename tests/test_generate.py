"""Texts are continued as the model alone would, whatever the path: single, batched, streamed, compiled."""

import sys

import needs
import pytest
import torch
import transformers as tf
from packed_models import pack_randomly
from tiny_models import FAMILIES, tiny_gpt2, tiny_llama, tiny_tokenizer

from nanoquant import checkpoint
from nanoquant.generate import generate, greedy_sample
from nanoquant.generation_settings import GenerationSettings

MODULE = sys.modules["nanoquant.generate"]  # the package shows the function of that name
RAGGED = ["Hello there", "a", "the river runs over stone", "light falls"]


def greedy(tokens, **others):
    return GenerationSettings(max_new_tokens=tokens, temperature=0, **others)


@pytest.fixture(scope="module")
def model():
    return tiny_llama(tie=False)


@pytest.fixture(scope="module")
def packed():
    return pack_randomly(tiny_llama(tie=False), scale_dtype=torch.float32)


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer()


def by_hand(model, tokenizer, prompt, count):
    """Most probable tokens without any cache."""
    ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
    start = ids.shape[1]
    for _ in range(count):
        with torch.no_grad():
            token = model(input_ids=ids, use_cache=False).logits[:, -1].argmax(-1, keepdim=True)
        ids = torch.cat([ids, token], dim=1)
        if token.item() == model.generation_config.eos_token_id:
            break
    return ids[0, start:].tolist()


def test_greedy_text_is_that_of_step_by_step_argmax(model, tokenizer):
    expected = by_hand(model, tokenizer, "Hello there", 8)
    done = generate(model, tokenizer, "Hello there", greedy(8))
    assert done.texts == [tokenizer.decode(expected, skip_special_tokens=True)]
    assert (done.prompt_tokens, done.new_tokens) == ([11], [len(expected)])
    assert greedy_sample(model, tokenizer, "Hello there", 8) == done.texts[0]


@pytest.mark.parametrize("batch", [1, 3, 8])
def test_a_batch_gives_what_each_prompt_gives_alone(batch, packed, tokenizer):
    alone = [generate(packed, tokenizer, prompt, greedy(12)) for prompt in RAGGED]
    together = generate(packed, tokenizer, RAGGED, greedy(12, batch=batch))
    assert together.texts == [one.texts[0] for one in alone]
    assert together.new_tokens == [one.new_tokens[0] for one in alone]
    assert len(together.prefill_seconds) == -(-len(RAGGED) // batch)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_continues_a_ragged_batch_as_single_prompts(family, tokenizer):
    model = FAMILIES[family]()
    together = generate(model, tokenizer, RAGGED[:3], greedy(6))
    assert together.texts == [greedy_sample(model, tokenizer, text, 6) for text in RAGGED[:3]]


def test_plain_generate_of_transformers_gives_the_same_tokens_from_a_loaded_folder(
    packed, tokenizer, tmp_path
):
    checkpoint.save_pretrained(packed, tmp_path / "out")
    loaded = tf.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    batch = tokenizer(RAGGED, padding=True, padding_side="left", return_tensors="pt")
    assert (batch["attention_mask"] == 0).any()
    batch.pop("token_type_ids", None)
    texts = generate(packed, tokenizer, RAGGED, greedy(12)).texts
    for cache in (None, "static"):
        ids = loaded.generate(
            **batch, max_new_tokens=12, do_sample=False, cache_implementation=cache
        )
        new = ids[:, batch["input_ids"].shape[1] :]
        assert tokenizer.batch_decode(new, skip_special_tokens=True) == texts


@needs.compiler
def test_compiled_steps_over_a_static_cache_give_the_same_text_and_compile_once(packed, tokenizer):
    texts = generate(packed, tokenizer, RAGGED[:2], greedy(8)).texts
    graphs = torch._dynamo.utils.counters["stats"]
    torch._dynamo.reset()
    graphs.clear()
    assert generate(packed, tokenizer, RAGGED[:2], greedy(8, compile=True)).texts == texts
    assert graphs["unique_graphs"] == 2  # the probe of the compiler, and the step
    for prompts in (RAGGED[2:], ["abc", "xyz"]):
        again = generate(packed, tokenizer, prompts, greedy(9, compile=True))
        assert again.texts == generate(packed, tokenizer, prompts, greedy(9)).texts
    assert graphs["unique_graphs"] == 2


def test_on_a_gpu_transformers_would_compile_the_steps_of_a_packed_model_into_graphs(
    packed, tokenizer, tmp_path, monkeypatch
):
    checkpoint.save_pretrained(packed, tmp_path / "out")
    model = checkpoint.load(tmp_path / "out")
    seen = []

    def spy(*, generation_config, **others):
        with monkeypatch.context() as context:
            context.setattr(type(model), "device", torch.device("cuda"))
            cache = tf.StaticCache(model.config, generation_config.max_cache_len)
            kwargs = {"past_key_values": cache}
            compiles = model._valid_auto_compile_criteria(kwargs, generation_config)
            mode = model._default_compile_config().mode
        seen.append((generation_config.cache_implementation, compiles, mode))
        raise KeyboardInterrupt

    monkeypatch.setattr(MODULE, "input_device", lambda model: FakeGpu())
    monkeypatch.setattr(MODULE, "compiler_obstacle", lambda device: "")
    monkeypatch.setattr("torch.random.fork_rng", lambda devices: torch.no_grad())
    monkeypatch.setattr(model, "generate", lambda ids, **kwargs: spy(**kwargs))
    with pytest.raises(KeyboardInterrupt):
        generate(model, tokenizer, "Hello", greedy(8))
    assert seen == [("static", True, "reduce-overhead")]


class FakeGpu(str):
    """A place that calls itself a GPU, where tensors can be put."""

    type = "cuda"

    def __new__(cls):
        return super().__new__(cls, "cpu")


def test_where_nothing_compiles_steps_run_uncompiled_or_the_request_is_refused(
    packed, tokenizer, monkeypatch, caplog
):
    monkeypatch.setattr(MODULE, "compiler_obstacle", lambda device: "no compiler")
    with pytest.raises(ValueError, match="can't be compiled: no compiler; leave compile out"):
        generate(packed, tokenizer, "Hello", greedy(4, compile=True))
    texts = generate(packed, tokenizer, "Hello", greedy(4)).texts
    assert not caplog.text
    monkeypatch.setattr(MODULE, "input_device", lambda model: FakeGpu())
    monkeypatch.setattr("torch.random.fork_rng", lambda devices: torch.no_grad())
    assert generate(packed, tokenizer, "Hello", greedy(4)).texts == texts
    assert "decode steps run uncompiled, which is slower: no compiler" in caplog.text


def test_a_row_that_has_ended_is_written_and_counted_up_to_its_end_token(packed, tokenizer):
    free = [by_hand(packed, tokenizer, prompt, 12) for prompt in RAGGED]
    end = free[0][4]
    expected = [row[: row.index(end) + 1] if end in row else row for row in free]
    pieces = {}
    done = generate(
        packed,
        tokenizer,
        RAGGED,
        greedy(12, options={"eos_token_id": [end, 2]}),
        lambda number, text, last: pieces.setdefault(number, []).append(text),
    )
    assert done.new_tokens == [len(row) for row in expected]
    assert done.texts == [tokenizer.decode(row, skip_special_tokens=True) for row in expected]
    assert ["".join(pieces[number]) for number in range(4)] == done.texts


def test_stop_strings_work_and_padding_after_them_is_not_counted(packed, tokenizer):
    text = generate(packed, tokenizer, RAGGED[0], greedy(12)).texts[0]
    stop = text[3:5]
    done = generate(packed, tokenizer, RAGGED, greedy(12, options={"stop_strings": [stop]}))
    assert done.texts[0] == text[: text.index(stop) + len(stop)]
    alone = generate(packed, tokenizer, RAGGED[0], greedy(12, options={"stop_strings": [stop]}))
    assert done.new_tokens[0] == alone.new_tokens[0] < 12


def test_sampling_depends_on_the_seed_alone(model, tokenizer):
    def sample(seed):
        settings = GenerationSettings(max_new_tokens=16, temperature=1.5, seed=seed)
        return generate(model, tokenizer, "Hello", settings).texts

    one = sample(1)
    state = torch.random.get_rng_state()
    assert one == sample(1) != sample(2)
    assert torch.equal(state, torch.random.get_rng_state())


def test_without_a_pad_token_the_end_token_pads_and_without_both_ragged_prompts_are_refused():
    model, tokenizer = tiny_gpt2(), tiny_tokenizer()
    tokenizer.pad_token = None
    assert model.generation_config.pad_token_id is None
    together = generate(model, tokenizer, RAGGED, greedy(6)).texts
    assert together == [greedy_sample(model, tokenizer, text, 6) for text in RAGGED]
    tokenizer.eos_token = model.generation_config.eos_token_id = None
    with pytest.raises(ValueError, match="neither a pad nor an end token"):
        generate(model, tokenizer, RAGGED, greedy(6))
    assert len(generate(model, tokenizer, RAGGED, greedy(6, batch=1)).texts) == 4
    assert len(generate(model, tokenizer, ["ab", "cd"], greedy(6)).texts) == 2


def test_a_prompt_too_long_for_the_positions_is_named_with_what_would_fit(model, tokenizer):
    prompts = ["short", "x" * 100]
    with pytest.raises(
        ValueError,
        match="prompt 2 has 100 tokens and 40 new .* 128 positions; ask for at most 28, or shorten",
    ):
        generate(model, tokenizer, prompts, greedy(40))
    assert generate(model, tokenizer, prompts, greedy(28)).new_tokens[1] <= 28
    with pytest.raises(ValueError, match="128 positions; shorten the prompt"):
        generate(model, tokenizer, "x" * 128, greedy(1))


def test_figures_hold_seconds_and_rates_of_prefill_and_decode(packed, tokenizer):
    options = {"suppress_tokens": [2]}
    done = generate(packed, tokenizer, RAGGED[:2], greedy(5, options=options))
    figures = done.figures()
    assert figures["decode_tokens"] == 8 and len(done.step_seconds) == 4
    assert figures["decode_tokens_per_second"] == 8 / sum(done.step_seconds)
    assert figures["prefill_tokens_per_second"] == 12 / done.prefill_seconds[0]
    one = generate(packed, tokenizer, "Hello", greedy(1)).figures()
    assert (one["decode_tokens"], one["decode_tokens_per_second"]) == (0, None)


def test_nothing_is_warned_about(model, tokenizer, capfd, recwarn):
    generate(model, tokenizer, RAGGED, greedy(4))
    generate(model, tokenizer, "Hello", GenerationSettings(max_new_tokens=4, temperature=0.7))
    captured = capfd.readouterr()
    assert captured.out + captured.err == "" and len(recwarn) == 0


def test_chat_template_is_applied_only_when_asked(model):
    tokenizer = tiny_tokenizer()
    with pytest.raises(ValueError, match="no chat template"):
        generate(model, tokenizer, "Hello", greedy(4, chat=True))
    tokenizer.chat_template = "{% for m in messages %}[{{ m['content'] }}]{% endfor %}"
    chat = generate(model, tokenizer, ["Hi", "You"], greedy(8, chat=True))
    assert chat.texts == generate(model, tokenizer, ["[Hi]", "[You]"], greedy(8)).texts


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        ("  ", "the prompt is empty"),
        ([], "there is no prompt"),
        (["a", "\n"], "prompt 2 of 2 is empty"),
    ],
    ids=["blank", "none", "second"],
)
def test_prompts_that_hold_nothing_are_refused(prompts, message, model, tokenizer):
    with pytest.raises(ValueError, match=message):
        generate(model, tokenizer, prompts)
