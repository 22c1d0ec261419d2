"""The whole method end to end on tiny models: sizes kept, errors named, results repeatable."""

import dataclasses

import pytest
import torch
from tiny_models import FAMILIES, random_windows, tiny_llama, tiny_mixtral, tiny_tokenizer

import nanoquant
from nanoquant.admm import ADMMConfig, ADMMInitializer
from nanoquant.block_config import BlockConfig
from nanoquant.budget import BudgetConfig
from nanoquant.config import CalibrationConfig, NanoQuantConfig
from nanoquant.embedding import EmbeddingConfig
from nanoquant.importance import ImportanceConfig
from nanoquant.model_config import ModelConfig
from nanoquant.packed_linear import PackedBinaryLinear
from nanoquant.progress import Progress
from nanoquant.quantize import quantize
from nanoquant.text import split_text
from nanoquant.training import RunConfig

TOKENS = random_windows(24, 16).flatten()
TINY = NanoQuantConfig(
    budget=BudgetConfig(bits=1.4, rank_multiple=8),
    calibration=CalibrationConfig(windows=4, length=16),
    admm=ADMMConfig(iterations=5),
    block=BlockConfig(
        schedule="algorithm1",
        windows=4,
        dense_epochs=1,
        refine_epochs=1,
        latent_lr=1e-3,
        scale_lr=1e-3,
    ),
    model=ModelConfig(windows=8, epochs=1, batch=2, held_out=4),
    run=RunConfig(accelerator="cpu"),
)
QUICK = dataclasses.replace(
    TINY,
    block=dataclasses.replace(TINY.block, dense_epochs=0, refine_epochs=0),
    model=dataclasses.replace(TINY.model, train="none"),
)


def packed_layers(model):
    return {n: m for n, m in model.named_modules() if isinstance(m, PackedBinaryLinear)}


def logits(model):
    with torch.no_grad():
        return model(input_ids=random_windows(2, 12, seed=5)).logits


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3"])
def test_a_model_is_packed_within_the_asked_bits_and_reloads_bit_for_bit(family, tmp_path):
    model = FAMILIES[family]()
    report = quantize(model, TOKENS, TINY)
    layers = packed_layers(model)
    assert layers.keys() == report.ranks.keys()
    assert {n: layer.rank for n, layer in layers.items()} == report.ranks
    weights = sum(layer.in_features * layer.out_features for layer in layers.values())
    used = sum(layer.bits for layer in layers.values()) / weights
    assert 0.9 * 1.4 <= used <= 1.4
    assert report.bits == pytest.approx(used)
    assert report.sizes.body_bits_per_weight == pytest.approx(used)
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    nanoquant.save_pretrained(model, tmp_path / "out")
    assert torch.equal(logits(nanoquant.load(tmp_path / "out")), logits(model))


def test_bfloat16_models_stay_bfloat16(tmp_path):
    model = tiny_llama(dtype=torch.bfloat16)
    quantize(model, TOKENS, TINY)
    kept = [p for n, p in model.named_parameters() if "signs" not in n]
    assert {p.dtype for p in kept} == {torch.bfloat16}
    nanoquant.save_pretrained(model, tmp_path / "out")


def test_reconstruction_follows_the_dense_model_better_than_initialization_alone():
    dense, longer = (
        tiny_llama(),
        dataclasses.replace(TINY.model, windows=16, epochs=4, latent_lr=1e-2),
    )
    errors = []
    for config in (QUICK, dataclasses.replace(TINY, model=longer)):
        model = tiny_llama()
        quantize(model, TOKENS, config)
        a, b = logits(model).log_softmax(-1), logits(dense).log_softmax(-1)
        errors.append(float((b.exp() * (b - a)).sum(-1).mean()))
    assert errors[1] < errors[0]


def test_report_tells_every_phase_and_is_plain_for_json():
    import json

    report = quantize(tiny_llama(), TOKENS, TINY)
    assert set(report.seconds) == {"calibrate", "blocks", "model", "pack"}
    assert sorted(report.blocks) == [0, 1]
    assert report.model.held_out[report.model.best_step] == min(report.model.held_out.values())
    assert json.loads(json.dumps(report.to_dict()))["config"]["budget"]["bits"] == 1.4


def test_progress_counts_every_phase_to_its_end():
    class Counting(Progress):
        counts = {}

        def begin(self, name, total):
            self.now, self.counts[name] = name, [0, total]

        def advance(self, done, note=""):
            self.counts[self.now][0] += done

    progress = Counting()
    quantize(tiny_llama(), TOKENS, TINY, progress=progress)
    assert set(progress.counts) == {"calibrate", "blocks", "model", "pack"}
    assert all(done == total for done, total in progress.counts.values())


def test_blocks_leaves_the_other_blocks_dense_as_they_were():
    dense, model = tiny_llama(), tiny_llama()
    quantize(model, TOKENS, dataclasses.replace(TINY, blocks="0:1"))
    names = packed_layers(model)
    assert names and all(name.startswith("model.layers.0.") for name in names)
    for name, parameter in dense.model.layers[1].named_parameters():
        assert torch.equal(model.model.layers[1].get_parameter(name), parameter)


def test_the_same_seed_gives_bit_equal_packed_tensors_and_another_seed_does_not():
    def run(seed):
        model = tiny_llama()
        quantize(
            model, TOKENS, dataclasses.replace(TINY, run=RunConfig(accelerator="cpu", seed=seed))
        )
        return model.state_dict()

    a, b, c = run(0), run(0), run(1)
    assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)
    assert any(not torch.equal(a[key], c[key]) for key in a if key.endswith("u_signs"))


def test_another_initializer_can_be_passed_in():
    ranks = []

    def spy(W, importance, rank, generator):
        ranks.append(rank)
        return ADMMInitializer(ADMMConfig(iterations=2))(W, importance, rank, generator)

    quantize(tiny_llama(), TOKENS, QUICK, initializer=spy)
    assert ranks


@pytest.mark.parametrize("place", ["work", "sensitivity_file"])
def test_files_that_can_not_tell_an_own_initializer_are_refused(place, tmp_path):
    with pytest.raises(ValueError, match=f"{place} and an own initializer exclude each other"):
        quantize(tiny_llama(), TOKENS, QUICK, initializer=print, **{place: tmp_path})


def test_losses_are_measured_with_the_initializer_that_is_passed_in():
    calls = []

    def spy(W, importance, rank, generator):
        calls.append((len(W), importance.input_correlation is not None))
        return ADMMInitializer(ADMMConfig(iterations=2))(W, importance, rank, generator)

    config = dataclasses.replace(
        QUICK,
        budget=dataclasses.replace(QUICK.budget, allocation="measured"),
        importance=ImportanceConfig(curvature="inputs"),
    )
    report = quantize(tiny_llama(), TOKENS, config, initializer=spy)
    linears = len(report.ranks)
    assert calls[:linears] == [(1, True)] * linears  # measured one by one, then all again
    assert sum(count for count, _ in calls) == 2 * linears


def test_text_is_tokenized_with_the_models_tokenizer(tmp_path):
    file = tmp_path / "text.txt"
    file.write_text("To be or not to be, that is the question. " * 40)
    quantize(tiny_llama(), file, QUICK, tiny_tokenizer())


def test_held_out_windows_are_the_end_of_the_text_and_used_nowhere_else():
    text = split_text(TOKENS, None, TINY)
    assert torch.equal(text.held_out, TOKENS.view(24, 16)[-4:])
    held = {tuple(row) for row in text.held_out.tolist()}
    for windows in (text.calibration, text.training):
        rows = {tuple(row) for row in windows.tolist()}
        assert len(rows) == len(windows) and not rows & held
    assert len(text.training) == 8 and len(text.calibration) == 4


def test_windows_begin_with_bos_when_the_tokenizer_adds_it(tmp_path):
    file = tmp_path / "text.txt"
    file.write_text("All happy families are alike. " * 40)
    text = split_text(file, tiny_tokenizer(add_bos=True), TINY)
    assert (text.training[:, 0] == 1).all() and text.training.shape[1] == 16


def test_too_short_text_tells_how_much_there_is_and_how_much_is_needed():
    with pytest.raises(
        ValueError, match=r"100 tokens, enough for 6 windows of 16; needed are 192: 8"
    ):
        quantize(tiny_llama(), TOKENS[:100], TINY)


def test_non_finite_weights_are_named_and_nothing_is_changed():
    model = tiny_llama()
    model.model.layers[1].mlp.up_proj.weight.data[3, 3] = float("nan")
    with pytest.raises(
        ValueError, match=r"non-finite weights in model\.layers\.1\.mlp\.up_proj\.weight"
    ):
        quantize(model, TOKENS, TINY)
    assert not packed_layers(model)


@pytest.mark.parametrize("bits", [0.3, 9.0])
def test_bits_that_cannot_be_met_are_refused_before_any_work(bits):
    config = dataclasses.replace(TINY, budget=BudgetConfig(bits=bits, rank_multiple=32))
    model = tiny_llama()
    with pytest.raises(ValueError, match=rf"bits={bits} can't be met"):
        quantize(model, TOKENS, config)
    assert not packed_layers(model)


def test_a_model_with_fused_experts_is_refused_by_name():
    with pytest.raises(ValueError, match=r"experts.*refused"):
        quantize(tiny_mixtral(), TOKENS, TINY)


def test_dropout_of_a_model_in_training_mode_does_not_reach_targets_or_teacher():
    runs = []
    for training in (True, False):
        model = FAMILIES["gpt2"]()
        model.config.attn_pdrop = model.config.resid_pdrop = 0.5
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.5
        report = quantize(model.train(training), TOKENS, TINY)
        runs.append(report.model.held_out)
    assert runs[0] == runs[1]


def test_embedding_and_head_are_quantized_at_the_end_if_asked(tmp_path):
    model, plain = tiny_llama(), tiny_llama()
    report = quantize(model, TOKENS, dataclasses.replace(QUICK, embedding=EmbeddingConfig(bits=4)))
    assert report.sizes.embedding_weights == 128 * 64
    assert (
        report.sizes.body_bits_per_weight
        == quantize(plain, TOKENS, QUICK).sizes.body_bits_per_weight
    )
    for name, layer in packed_layers(plain).items():
        assert torch.equal(layer.u_signs, packed_layers(model)[name].u_signs)
    again = nanoquant.load(nanoquant.save_pretrained(model, tmp_path / "out"))
    assert torch.equal(logits(again), logits(model))
