"""Budgets that belong to the file: exact bytes, and an embedding whose bits are chosen with the ranks."""

import dataclasses
import importlib
import logging

import pytest
import torch
from test_embedding_memory import PARTS, allocated
from tiny_models import FAMILIES, random_windows, tiny_llama

import nanoquant.file_budget
from nanoquant.admm import ADMMConfig
from nanoquant.architectures import find_decoder
from nanoquant.budget import BudgetConfig, allocate_ranks, step_bits, used_bits
from nanoquant.checkpoint import read_sizes, save_pretrained
from nanoquant.config import CalibrationConfig, nanoquant_config
from nanoquant.embedding import PART_BYTES, EmbeddingConfig, dense_matrix
from nanoquant.file_budget import embedding_weights, header_bytes, other_bytes
from nanoquant.methods import METHODS
from nanoquant.model_config import ModelConfig
from nanoquant.model_embeddings import quantize_embeddings, quantized_tables
from nanoquant.quantize import quantize
from nanoquant.ranks import check_budget, decoder_shapes
from nanoquant.sensitivity import SensitivityConfig
from nanoquant.sizes import measure_sizes
from nanoquant.sources import weight_bytes

TOKENS = random_windows(8, 16).flatten()
SHORT = SensitivityConfig(iterations=2, length=8)


def quick(file, bits=16, allocation="uniform", **model):
    """Initialization only, of a tiny model, within a file."""
    return nanoquant_config(
        budget=BudgetConfig(file=file, rank_multiple=8, allocation=allocation),
        embedding=EmbeddingConfig(bits=bits),
        calibration=CalibrationConfig(windows=4, length=16),
        admm=ADMMConfig(iterations=2),
        sensitivity=SHORT if allocation == "measured" else SensitivityConfig(),
        model=ModelConfig(**{"train": "none"} | model),
    )


def options(model, config, chosen=None):
    """What the budget leaves of a config."""
    decoder = find_decoder(model)
    return check_budget(model, decoder, chosen or range(len(decoder.blocks)), config)


def fixed(model, bits=16):
    """Bytes of a file without signs and scales."""
    decoder = find_decoder(model)
    names = decoder_shapes(decoder, range(2))
    rest = other_bytes(model, decoder, range(2), EmbeddingConfig(bits=bits))
    return rest + header_bytes(model, names, METHODS["binary"].parts)


def kilobytes(size):
    return f"{size / 1e3:.3f}kB"


@pytest.mark.parametrize("bits", [16, 8, 4])
@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_no_linear_takes_the_bytes_that_a_quantized_model_has_besides_them(family, bits):
    model = FAMILIES[family]()
    decoder = find_decoder(model)
    chosen, embedding = range(len(decoder.blocks)), EmbeddingConfig(bits=bits)
    rest = other_bytes(model, decoder, chosen, embedding)
    shapes = decoder_shapes(decoder, chosen)
    config = dataclasses.replace(quick(None, bits), budget=BudgetConfig(rank_multiple=8))
    report = quantize(model, TOKENS, config)
    assert rest + used_bits(shapes, report.ranks) // 8 == measure_sizes(model).bytes_on_disk


@pytest.mark.parametrize("allocation", ["uniform", "prior", "measured"])
@pytest.mark.parametrize("bits", [16, 8])
def test_a_file_is_filled_but_for_less_than_a_step_of_one_linear(allocation, bits, tmp_path):
    model = tiny_llama()
    shapes = decoder_shapes(find_decoder(model), range(2))
    rest = other_bytes(model, find_decoder(model), range(2), EmbeddingConfig(bits=bits))
    headers = header_bytes(model, shapes, METHODS["binary"].parts)
    body = used_bits(shapes, allocate_ranks(shapes, BudgetConfig(rank_multiple=8))) // 8
    asked = rest + body + headers + 400
    report = quantize(model, TOKENS, quick(kilobytes(asked), bits, allocation))
    save_pretrained(model, tmp_path / "out")
    stored = read_sizes(tmp_path / "out").bytes_on_disk
    step = min(step_bits(shapes[name], rank, 8) for name, rank in report.ranks.items()) // 8
    assert asked - step < stored + headers <= asked
    assert asked - step - headers / 3 < weight_bytes(tmp_path / "out") <= asked
    assert report.config["budget"]["file"] is None
    assert report.config["budget"]["bits"] == pytest.approx(report.bits, rel=0.05)


def test_blocks_that_stay_dense_count_as_rest():
    model = tiny_llama()
    decoder, embedding = find_decoder(model), EmbeddingConfig()
    one, both = (other_bytes(model, decoder, range(n), embedding) for n in (1, 2))
    block = sum(4 * d_out * d_in for d_out, d_in in decoder_shapes(decoder, range(1)).values())
    assert one - both == block


def test_files_that_cannot_be_met_are_refused_with_how_much_is_missing():
    model = tiny_llama()
    with pytest.raises(
        ValueError, match=r"file=1kB.*no linear of a block takes .* alone, .* more than"
    ):
        options(model, quick("1kB"))
    rest = fixed(model)
    with pytest.raises(ValueError, match=r"linears get \d+\.\d kB: bits=.* too high"):
        options(model, quick(kilobytes(rest + 90_000)))
    with pytest.raises(ValueError, match=r"linears get \d+\.\d kB: bits=.* too low"):
        options(model, quick(kilobytes(rest + 1000)))
    with pytest.raises(ValueError, match=r"bits=16, .*bits=8, .*bits=4, "):
        options(model, quick("1kB", None))


def test_bits_and_a_file_exclude_each_other():
    with pytest.raises(ValueError, match=r"budget.bits=0.8 and budget.file=70MB exclude"):
        BudgetConfig(bits=0.8, file="70MB")
    with pytest.raises(ValueError, match="budget.file must be a number above 0 with a unit"):
        BudgetConfig(file="70")
    with pytest.raises(ValueError, match="chosen by quantize under budget.file; give 16, 8 or 4"):
        quantize_embeddings(tiny_llama(), EmbeddingConfig(bits=None))
    with pytest.raises(ValueError, match="budget.file, such as 70MB, or 16, 8 or 4"):
        nanoquant_config(embedding=EmbeddingConfig(bits=None))


def test_an_open_embedding_needs_measured_losses_unless_one_storage_is_possible(caplog):
    model = tiny_llama(dtype=torch.bfloat16)
    rest = {bits: fixed(model, bits) for bits in (16, 8, 4)}
    with pytest.raises(ValueError, match=r"embedding.bits 16 or 8 or 4.*allocation=measured"):
        options(model, quick(kilobytes(rest[16] + 9000), None))
    (only,) = options(model, quick(kilobytes(rest[4] + 6000), None))
    assert only.embedding.bits == 4  # 8 bits would leave 2 kB for linears
    assert "can't be met with embedding.bits=8, the linears get" in caplog.text


def test_an_embedding_that_breaks_the_model_is_no_choice(monkeypatch):
    model, windows = tiny_llama(), random_windows(2, 16)
    dense = nanoquant.file_budget.DensePrefix(model, find_decoder(model), windows)
    monkeypatch.setattr(dense, "logits_from", lambda _: torch.full_like(dense.logits, float("nan")))
    with pytest.raises(ValueError, match="with the embedding at 4 bits is nan"):
        nanoquant.file_budget.embedding_divergence(model, dense, EmbeddingConfig(bits=4))


def test_what_weighs_the_embedding_is_refused_where_its_storage_is_fixed():
    weighs = dataclasses.replace(SHORT, remains=0.9)
    config = dataclasses.replace(quick("1MB", 8, "measured"), sensitivity=weighs)
    with pytest.raises(ValueError, match="remains=0.9 and embedding.bits=8 exclude each other"):
        options(tiny_llama(), config)


@pytest.mark.parametrize(("remains", "chosen"), [(0.01, 16), (1.0, 4)])
def test_the_less_remains_of_the_linears_losses_the_more_the_embedding_gets(
    remains, chosen, monkeypatch
):
    monkeypatch.setattr(
        "nanoquant.ranks.embedding_divergence", lambda m, d, e: 0.2 * (e.bits != 16)
    )
    model = tiny_llama(dtype=torch.bfloat16)
    config = quick(kilobytes(fixed(model) + 6000), None, "measured")
    config = dataclasses.replace(config, sensitivity=dataclasses.replace(SHORT, remains=remains))
    assert quantize(model, TOKENS, config).config["embedding"]["bits"] == chosen


@pytest.mark.parametrize(
    "costs, chosen", [({8: 0.0, 4: 9.0}, 8), ({8: 0.0, 4: 0.0}, 4), ({8: 9.0, 4: 9.0}, 16)]
)
def test_the_storage_with_the_least_expected_divergence_is_chosen(costs, chosen, monkeypatch):
    costs = {16: 0.0} | costs
    monkeypatch.setattr("nanoquant.ranks.embedding_divergence", lambda m, d, e: costs[e.bits])
    model = tiny_llama(dtype=torch.bfloat16)
    rest = fixed(model)
    report = quantize(model, TOKENS, quick(kilobytes(rest + 6000), None, "measured"))
    assert report.config["embedding"]["bits"] == chosen
    assert (report.sizes.embedding_bits_per_weight is None) == (chosen == 16)


def test_what_the_embedding_costs_is_measured_and_leaves_the_model_as_it_was():
    model, windows = tiny_llama(), random_windows(2, 16)
    before = embedding_weights(model)[0].clone()
    dense = nanoquant.file_budget.DensePrefix(model, find_decoder(model), windows)
    costs = [
        nanoquant.file_budget.embedding_divergence(model, dense, EmbeddingConfig(bits=bits))
        for bits in (16, 8, 4)
    ]
    assert costs[0] == 0 < costs[1] < costs[2]
    assert torch.equal(embedding_weights(model)[0], before)
    quantize_embeddings(model, EmbeddingConfig(bits=4))
    with torch.no_grad():
        p, q = dense.logits.log_softmax(-1), model(windows).logits.log_softmax(-1)
    assert costs[2] == pytest.approx(float((p.exp() * (p - q)).sum(-1).mean()), rel=1e-3)


@pytest.mark.parametrize("bits", [8, 4])
def test_a_storage_is_measured_in_the_memory_of_the_rounded_embedding(bits, monkeypatch):
    monkeypatch.setattr("nanoquant.embedding.PART", PARTS)
    model, config = tiny_llama(tie=False, vocab_size=8192), EmbeddingConfig(bits=bits)

    def round_both():
        with nanoquant.file_budget._rounded(model, config):
            pass

    own = sum(weight.nbytes for weight in embedding_weights(model))
    assert allocated(round_both) < own + PART_BYTES * PARTS < 1.2 * own


def test_measured_storages_are_kept_for_a_run_that_goes_on(tmp_path, caplog):
    rest = fixed(tiny_llama())
    config = quick(kilobytes(rest + 6000), None, "measured")
    first = quantize(tiny_llama(), TOKENS, config, sensitivity_file=tmp_path / "s.json")
    with caplog.at_level(logging.INFO, logger="nanoquant"):
        again = quantize(tiny_llama(), TOKENS, config, sensitivity_file=tmp_path / "s.json")
    assert "has 10 measured groups; they are kept" in caplog.text
    assert again.ranks == first.ranks
    assert "embedding at 16 bits, linears at" in caplog.text


@pytest.mark.parametrize("tie", [True, False])
def test_training_sees_the_embedding_that_is_stored(tie, monkeypatch):
    model = tiny_llama(tie=tie)
    dense = model.get_input_embeddings().weight.detach().clone()
    seen = []

    def look(run, *rest):
        seen.append(run.model.get_input_embeddings().weight.detach().clone())
        return old(run, *rest)

    module = importlib.import_module("nanoquant.quantize")
    old = module.reconstruct_model
    monkeypatch.setattr(module, "reconstruct_model", look)
    config = quick(None, 4, train="scales", windows=2, held_out=1)
    quantize(model, TOKENS, dataclasses.replace(config, budget=BudgetConfig(rank_multiple=8)))
    table = quantized_tables(model)["model.embed_tokens"]
    stored = dense_matrix(table)
    assert torch.equal(seen[0], stored) and not torch.equal(stored, dense)
