import pytest
import torch
from tiny_models import FAMILIES, tiny_llama, tiny_tokenizer

from nanoquant.generate import generate


@pytest.fixture(scope="module")
def model():
    return tiny_llama(tie=False)


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer()


def test_greedy_text_is_that_of_step_by_step_argmax(model, tokenizer):
    ids = tokenizer("Hello there", return_tensors="pt")["input_ids"]
    start = ids.shape[1]
    for _ in range(8):
        with torch.no_grad():
            token = model(input_ids=ids, use_cache=False).logits[:, -1].argmax(-1, keepdim=True)
        ids = torch.cat([ids, token], dim=1)
        if token.item() == model.generation_config.eos_token_id:
            break
    expected = tokenizer.decode(ids[0, start:], skip_special_tokens=True)
    assert generate(model, tokenizer, "Hello there", 8) == expected


def test_sampling_depends_on_the_seed_alone(model, tokenizer):
    one = generate(model, tokenizer, "Hello", 16, temperature=1.5, seed=1)
    state = torch.random.get_rng_state()
    same = generate(model, tokenizer, "Hello", 16, temperature=1.5, seed=1)
    other = generate(model, tokenizer, "Hello", 16, temperature=1.5, seed=2)
    assert one == same != other
    assert torch.equal(state, torch.random.get_rng_state())


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_generates(family, tokenizer):
    model = FAMILIES[family]()
    assert isinstance(generate(model, tokenizer, "abc", 4), str)


def test_generation_settings_of_the_model_are_used_and_kept(model, tokenizer, monkeypatch):
    greedy = generate(model, tokenizer, "Hello", 8)
    monkeypatch.setattr(model.generation_config, "suppress_tokens", list(range(4, 80)))
    before = model.generation_config.to_dict()
    assert generate(model, tokenizer, "Hello", 8) != greedy
    assert model.generation_config.to_dict() == before


def test_nothing_is_warned_about(model, tokenizer, capfd, recwarn):
    generate(model, tokenizer, "Hello", 4)
    generate(model, tokenizer, "Hello", 4, temperature=0.7)
    captured = capfd.readouterr()
    assert captured.out + captured.err == "" and len(recwarn) == 0


def test_chat_template_is_applied_only_when_asked(model):
    tokenizer = tiny_tokenizer()
    with pytest.raises(ValueError, match="no chat template"):
        generate(model, tokenizer, "Hello", 4, chat=True)
    tokenizer.chat_template = "{% for m in messages %}[{{ m['content'] }}]{% endfor %}"
    assert generate(model, tokenizer, "Hi", 8, chat=True) == generate(model, tokenizer, "[Hi]", 8)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prompt": "  "}, "the prompt is empty"),
        ({"max_new_tokens": 0}, "max_new_tokens is 0; allowed: 1 or more"),
        ({"temperature": -1.0}, "temperature is -1.0"),
        ({"temperature": float("nan")}, "temperature is nan"),
    ],
    ids=["prompt", "tokens", "negative", "nan"],
)
def test_bad_arguments_say_what_is_allowed(model, tokenizer, change, message):
    arguments = {"prompt": "Hello", "max_new_tokens": 4} | change
    with pytest.raises(ValueError, match=message):
        generate(model, tokenizer, **arguments)
