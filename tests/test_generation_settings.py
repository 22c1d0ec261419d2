"""The model's own generation config holds unless a setting says otherwise, and it is left as it was."""

import pytest
from tiny_models import tiny_llama, tiny_tokenizer

from nanoquant.generate import generate, greedy_sample
from nanoquant.generation_settings import GenerationSettings, end_tokens, own_config


@pytest.fixture
def model():
    return tiny_llama()


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer()


def config_of(model, tokenizer, **settings):
    return own_config(model, tokenizer, GenerationSettings(**settings))


def test_settings_of_the_model_are_used_and_kept(model, tokenizer):
    greedy = greedy_sample(model, tokenizer, "Hello", 8)
    model.generation_config.suppress_tokens = list(range(4, 80))
    before = model.generation_config.to_dict()
    assert greedy_sample(model, tokenizer, "Hello", 8) != greedy
    assert model.generation_config.to_dict() == before


def test_a_model_that_samples_does_so_unless_the_temperature_is_0(model, tokenizer, capfd):
    model.generation_config.update(do_sample=True, temperature=1.5, top_p=0.9, max_new_tokens=12)
    own = config_of(model, tokenizer)
    assert (own.do_sample, own.temperature, own.top_p) == (True, 1.5, 0.9)
    warmer = config_of(model, tokenizer, temperature=2.0, top_p=0.5)
    assert (warmer.do_sample, warmer.temperature, warmer.top_p) == (True, 2.0, 0.5)
    assert not config_of(model, tokenizer, temperature=0).do_sample
    texts = {
        generate(model, tokenizer, "Hello", GenerationSettings(seed=seed)).texts[0]
        for seed in range(3)
    }
    assert len(texts) == 3
    cold = GenerationSettings(temperature=0)
    assert generate(model, tokenizer, "Hello", cold).texts[0] == greedy_sample(
        tiny_llama(), tokenizer, "Hello", 12
    )
    captured = capfd.readouterr()
    assert captured.out + captured.err == ""


def test_length_limits_of_the_model_hold_and_are_overridden(model, tokenizer, capfd):
    model.generation_config.update(eos_token_id=None)

    def count(**settings):
        return generate(model, tokenizer, "Hello", GenerationSettings(**settings)).new_tokens

    assert count() == [60]
    model.generation_config.max_length = 20
    assert count() == [15] and count(max_new_tokens=30) == [30]
    with pytest.raises(ValueError, match="prompt 1 has 20 tokens.* max_length 20; shorten it, or"):
        generate(model, tokenizer, "x" * 20)
    model.generation_config.update(max_length=None, max_new_tokens=7)
    assert count() == [7] and count(max_new_tokens=9) == [9]
    captured = capfd.readouterr()
    assert captured.out + captured.err == ""


def test_every_end_token_of_a_list_ends_a_text(model, tokenizer):
    model.generation_config.eos_token_id = [2, 40]
    assert end_tokens(config_of(model, tokenizer)) == {2, 40}
    model.generation_config.update(eos_token_id=list(range(128)))
    settings = GenerationSettings(max_new_tokens=8)
    assert generate(model, tokenizer, ["Hello", "a"], settings).new_tokens == [1, 1]


def test_options_reach_the_generation_config(model, tokenizer):
    config = config_of(model, tokenizer, options={"repetition_penalty": 1.3, "min_new_tokens": 2})
    assert (config.repetition_penalty, config.min_new_tokens) == (1.3, 2)


@pytest.mark.parametrize("outside", [-1, 128])
def test_a_pad_token_outside_the_vocabulary_is_not_used_and_said_once(
    outside, model, tokenizer, caplog
):
    model.generation_config.pad_token_id = outside
    for _ in range(2):
        assert config_of(model, tokenizer).pad_token_id == tokenizer.pad_token_id
    (said,) = caplog.messages
    assert f"pad_token_id {outside} is not among the 128 tokens" in said
    assert f"token {tokenizer.pad_token_id} pads instead" in said


def test_a_pad_token_of_the_vocabulary_is_taken_without_a_word(model, tokenizer, caplog):
    model.generation_config.pad_token_id = 127
    assert config_of(model, tokenizer).pad_token_id == 127 and not caplog.messages


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens is 0; allowed: 1 or more"),
        ({"batch": 0}, "batch is 0; allowed: 1 or more"),
        ({"temperature": -1.0}, "temperature is -1.0"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"temperature": 1e-40}, "temperature is 1e-40; allowed: 0 .greedy. or 0.0001 and above"),
        ({"seed": -1}, "seed is -1; allowed: 0 to"),
        ({"options": {"stop_strings": 5}}, "option stop_strings is 5; it must be a text or a list"),
        ({"options": {"eos_token_id": "x"}}, "option eos_token_id is 'x'; it must be a token"),
        ({"options": {"max_time": "x"}}, "option max_time is 'x'; it must be a number"),
        ({"temperature": 1.0, "top_p": 0.0}, "top_p is 0.0; allowed: above 0 and up to 1"),
        ({"top_p": 0.9}, "top_p needs sampling; give a temperature above 0"),
        ({"options": {"repetition_penality": 1.1}}, "options near it: repetition_penalty"),
        ({"options": {"max_length": 9}}, "max_length can't be an option"),
        ({"options": {"suppress_tokens": None}}, "suppress_tokens is null"),
        ({"options": {"num_beams": 4}}, "asks for beam_search with 1 texts a prompt; allowed"),
        (
            {"temperature": 1.0, "options": {"num_return_sequences": 2}},
            "asks for sample with 2 texts a prompt",
        ),
    ],
    ids=str,
)
def test_bad_settings_say_what_is_allowed(settings, message, model, tokenizer):
    with pytest.raises(ValueError, match=message):
        config_of(model, tokenizer, **settings)


def test_an_unknown_setting_is_an_error():
    with pytest.raises(TypeError, match="temprature"):
        GenerationSettings(temprature=1.0)
