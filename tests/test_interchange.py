"""Packed states of the published code and of its llama.cpp port are read, and the latter written, sign for sign."""

import json
import os
import pickle

import pytest
import torch
from command_line import call, refused
from safetensors.torch import load_file, save_file
from tiny_models import random_windows, tiny_gpt2, tiny_llama, tiny_qwen2, tiny_tokenizer

from nanoquant import load, pack_model, save_pretrained
from nanoquant.architectures import find_decoder, linear_shape
from nanoquant.embedding import EmbeddingConfig
from nanoquant.interchange.convert import export_words, import_words
from nanoquant.interchange.words import from_words, to_words
from nanoquant.linear import BinaryLowRankLinear
from nanoquant.model_embeddings import quantize_embeddings
from nanoquant.packed_layers import packed_modules
from nanoquant_kernels import pack_signs

pytestmark = pytest.mark.usefixtures("untouched_process")


def published_words(signs):
    """Words of a matrix of signs by the definition: 32 a word, the first in the lowest bit, set for -1."""
    rows = []
    for row in signs.tolist():
        row = [*row, *[1] * (-len(row) % 32)]
        words = [sum((row[w + j] < 0) << j for j in range(32)) for w in range(0, len(row), 32)]
        rows.append([word - 2**32 if word >= 2**31 else word for word in words])
    return torch.tensor(rows, dtype=torch.int32)


@pytest.mark.parametrize("columns", [1, 8, 31, 32, 33, 95, 128])
def test_words_are_those_of_the_published_code(columns):
    signs = torch.randn(5, columns).sign()
    words = to_words(pack_signs(signs), columns)
    assert torch.equal(words, published_words(signs))
    assert torch.equal(from_words(words, columns, "U"), pack_signs(signs))


def test_words_of_another_shape_or_order_are_refused():
    words = to_words(pack_signs(torch.ones(3, 40)), 40)
    with pytest.raises(ValueError, match=r"U must be int32 words \(rows, 1\) for 30 columns"):
        from_words(words, 30, "U")
    with pytest.raises(ValueError, match="int32 words"):
        from_words(words.long(), 40, "U")
    for column in (40, 47, 63):
        wrong = words.clone()
        wrong[1, 1] |= 1 << (column - 32) if column < 63 else -(2**31)
        with pytest.raises(ValueError, match="bits set past column 39"):
            from_words(wrong, 40, "U")


@pytest.fixture(
    scope="module", params=[tiny_llama, tiny_qwen2, tiny_gpt2], ids=["plain", "bias", "Conv1D"]
)
def made(request, tmp_path_factory):
    """A folder with a dense model, a checkpoint of it, and the state that the published code would save."""
    folder = tmp_path_factory.mktemp("words")
    model = request.param(dtype=torch.bfloat16)
    model.save_pretrained(folder / "dense")
    tiny_tokenizer().save_pretrained(folder / "dense")
    state = {name: tensor.clone() for name, tensor in model.named_parameters()}
    for name, dense in find_decoder(model).linear_modules().items():
        layer = BinaryLowRankLinear(*reversed(linear_shape(dense)), 24, dense.bias is not None)
        for vector in (layer.s1, layer.s2):
            torch.nn.init.uniform_(vector, 0.01, 0.1)
            vector.data = vector.data.bfloat16().float()
        if layer.bias is not None:
            layer.bias.data = dense.bias.data.float()
        model.set_submodule(name, layer)
        del state[f"{name}.weight"]
        state |= {
            f"{name}.U_packed": published_words(layer.U.sign()),
            f"{name}.V_packed": published_words(layer.V.mT.sign()),
            f"{name}.U_shape": torch.tensor(layer.U.shape),
            f"{name}.V_shape": torch.tensor(layer.V.mT.shape),
            f"{name}.scale_post": layer.s1.data.bfloat16().view(1, -1),
            f"{name}.scale_pre": layer.s2.data.bfloat16().view(1, -1),
        }
    pack_model(model)
    save_pretrained(model, folder / "out", folder / "dense")
    torch.save(state, folder / "state.pt")
    return folder, state


def names_of(state):
    """Quantized linears of a state."""
    return [name.removesuffix(".U_packed") for name in state if name.endswith(".U_packed")]


def same_checkpoint(one, two):
    a, b = load(one), load(two)
    assert packed_modules(a).keys() == packed_modules(b).keys()
    pairs = zip(a.state_dict().items(), b.state_dict().items(), strict=True)
    assert all(n == m and x.dtype == y.dtype and torch.equal(x, y) for (n, x), (m, y) in pairs)
    ids = random_windows(2, 12)
    with torch.no_grad():
        assert torch.equal(a(input_ids=ids).logits, b(input_ids=ids).logits)


def test_a_packed_state_becomes_the_checkpoint_of_the_same_signs(made, tmp_path, capsys):
    folder, state = made
    command = [
        "import",
        folder / "state.pt",
        "--output",
        tmp_path / "out",
        "--dense",
        folder / "dense",
    ]
    code, out, err = call(capsys, *command)
    assert code == 0 and f"{len(names_of(state))} linears\n" in out, err
    same_checkpoint(folder / "out", tmp_path / "out")


def test_words_that_are_written_come_back_bit_for_bit(made, tmp_path, capsys):
    folder, state = made
    code, _, err = call(capsys, "export", folder / "out", "--output", tmp_path / "words")
    assert code == 0, err
    files = sorted(f.name for f in (tmp_path / "words").glob("*.safetensors"))
    assert files == [
        "model-block-00000.safetensors", "model-block-00001.safetensors", "model-rest.safetensors"
    ]  # fmt: skip
    written = {}
    for file in files:
        written |= load_file(tmp_path / "words" / file)
    for name, tensor in state.items():
        if name in written:
            assert torch.equal(written[name].flatten(), tensor.flatten().to(written[name].dtype)), (
                name
            )
    assert {n for n in state if "packed" in n} == {n for n in written if "packed" in n}
    index = json.loads((tmp_path / "words" / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == written.keys()
    assert "quantization_config" not in json.loads((tmp_path / "words" / "config.json").read_text())
    import_words(tmp_path / "words", tmp_path / "again", str(tmp_path / "words"))
    same_checkpoint(folder / "out", tmp_path / "again")


def changed(state, **changes):
    name, new = names_of(state)[-1], dict(state)
    for part, value in changes.items():
        if value is None:
            del new[f"{name}.{part}"]
        else:
            new[f"{name}.{part}"] = value(state.get(f"{name}.{part}"))
    return new


WRONG = {
    "has no scale_pre": {"scale_pre": None},
    "U_packed has 1 rows": {"U_packed": lambda t: t[:1]},
    r"U_shape is \[24, ": {"U_shape": lambda t: t.flip(0)},
    "U_shape is 5": {"U_shape": lambda _: 5},
    "scale_mid has scales of each rank that differ": {"scale_mid": lambda _: torch.arange(24.0)},
    "kept apart have no place": {"salient_idx": lambda _: torch.tensor([1])},
    "scale_mid must hold numbers .* got list": {"scale_mid": lambda _: [1.0] * 24},
    "scale_pre must hold numbers .* got torch.int32": {"scale_pre": lambda t: t.int()},
    "scale_post must hold numbers .* got torch.complex64": {
        "scale_post": lambda t: t.to(torch.complex64)
    },
    "scale_post must hold numbers .* got torch.float8": {
        "scale_post": lambda t: t.to(torch.float8_e4m3fn)
    },
    "scale_post holds NaN": {"scale_post": lambda t: t / 0},
    "U_packed must be int32 words .* got torch.int32 ": {
        "U_packed": lambda _: torch.tensor(3, dtype=torch.int32)
    },
    "U_packed must be int32 words, got str": {"U_packed": lambda _: "words"},
    r"V_packed must be words .*, got \(0, 2\)": {"V_packed": lambda t: t[:0, :2]},
    "V_packed must be words .* got int": {"V_packed": lambda _: 3},
    "bias must hold numbers": {"bias": lambda _: "x"},
    r"bias has 1 numbers|has a bias in the": {"bias": lambda _: torch.ones(1)},
    "no such tensor": {"unknown": lambda _: torch.ones(2)},
    "is no tensor, but a str": {"note": lambda _: "hello"},
}


@pytest.mark.parametrize("message", WRONG)
def test_a_state_that_does_not_fit_is_refused_by_name(made, message, tmp_path):
    folder, state = made
    torch.save(changed(state, **WRONG[message]), tmp_path / "state.pt")
    with pytest.raises(ValueError, match=message):
        import_words(tmp_path / "state.pt", tmp_path / "out", str(folder / "dense"))
    assert not (tmp_path / "out").exists()


def test_an_equal_scale_of_all_ranks_is_multiplied_in(made, tmp_path):
    folder, state = made
    torch.save(changed(state, scale_mid=lambda _: torch.full((24,), 2.0)), tmp_path / "state.pt")
    import_words(tmp_path / "state.pt", tmp_path / "out", str(folder / "dense"))
    name = names_of(state)[-1]
    before, after = (load(f).get_submodule(name) for f in (folder / "out", tmp_path / "out"))
    assert torch.equal(after.s1.float(), 2 * before.s1.float())


def test_linears_that_stay_dense_are_counted(made, tmp_path, capsys):
    folder, state = made
    name, *others = names_of(state)
    dense = load_file(folder / "dense" / "model.safetensors")[f"{name}.weight"]
    new = {k: v for k, v in state.items() if not k.startswith(name) or k == f"{name}.bias"}
    new[f"{name}.weight"] = dense
    save_file({k: v.contiguous() for k, v in new.items()}, tmp_path / "state.safetensors")
    command = ["import", tmp_path / "state.safetensors", "--output", tmp_path / "out"]
    code, out, err = call(capsys, *command, "--dense", folder / "dense")
    assert code == 0 and f"{len(others)} linears, 1 more of the decoder are dense in it" in out, err


class Evil:
    def __reduce__(self):
        return os.system, ("touch owned",)


def test_pickled_code_is_refused_and_not_run(made, tmp_path, monkeypatch, capsys):
    folder, state = made
    monkeypatch.chdir(tmp_path)
    torch.save(state | {"evil": Evil()}, "zip.pt")
    (tmp_path / "plain.pt").write_bytes(pickle.dumps(Evil()))
    for name in ("zip.pt", "plain.pt"):
        line = refused(capsys, "import", name, "--output", "out", "--dense", folder / "dense")
        assert "pickled code" in line and not (tmp_path / "owned").exists()


def test_files_of_other_kinds_are_refused(made, tmp_path, capsys):
    folder, _ = made
    command = ["--output", tmp_path / "out", "--dense", folder / "dense"]
    (tmp_path / "torn.pt").write_bytes((folder / "state.pt").read_bytes()[:500])
    (tmp_path / "torn.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0{}")
    (tmp_path / "text.gguf").write_text("x")
    for file, message in {
        tmp_path / "torn.pt": "damaged",
        tmp_path / "torn.safetensors": "damaged",
        tmp_path / "text.gguf": "must end in .safetensors",
        tmp_path / "none.pt": "is no file",
        folder / "dense": "no quantized linear",
    }.items():
        assert message in refused(capsys, "import", file, *command)
    assert "quantized already" in refused(
        capsys, "import", folder / "state.pt", "--output", tmp_path / "o", "--dense", folder / "out"
    )


def test_what_words_can_not_hold_is_refused(made, tmp_path, capsys):
    folder, _ = made
    model = quantize_embeddings(load(folder / "out"), EmbeddingConfig(bits=8))
    save_pretrained(model, tmp_path / "small")
    assert "--embedding.bits 16" in refused(
        capsys, "export", tmp_path / "small", "--output", tmp_path / "words"
    )
    with pytest.raises(ValueError, match="not empty|is not"):
        export_words(folder / "out", folder / "dense")
