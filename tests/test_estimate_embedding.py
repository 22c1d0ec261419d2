"""Memory of an embedding at 8 or 4 bits is known beforehand: its tables, and the student's own rounded copy."""

import dataclasses
import importlib

import pytest
import torch
from test_file_budget import fixed, kilobytes, quick
from tiny_models import random_windows, tiny_llama

from nanoquant.config import nanoquant_config
from nanoquant.embedding import EmbeddingConfig, table_bytes
from nanoquant.estimate.initialization import choose_ranks
from nanoquant.estimate.limits import Plan, quantities
from nanoquant.estimate.subject import skeleton_in, subject_of
from nanoquant.estimate.terms import Use
from nanoquant.quantize import quantize

ROUNDED, TABLES = "embedding and head, rounded", "tables of embedding and head"
BEYOND = "embedding and head, rounded, beyond what a group takes later"


def settings(bits, train="scales"):
    return nanoquant_config(
        2.0,
        budget={"rank_multiple": 8, "allocation": "uniform"},
        calibration={"windows": 4, "length": 16},
        admm={"iterations": 2},
        block={"windows": 2},
        model={"train": train, "windows": 2, "held_out": 1},
        embedding={"bits": bits},
    )


def plan(config, gpu=False, **changes):
    model = skeleton_in(tiny_llama(**changes).config, torch.float32)
    return Plan(subject_of("tiny", model, config, 10**6, mapped=True), config, Use(0, gpu))


def terms(config, phase, **changes):
    needs = {need.phase: need for need in plan(config, **changes).needs()}
    return {term.name: term.bytes for term in needs[phase].terms}


@pytest.mark.parametrize("tie", [True, False])
@pytest.mark.parametrize("bits", [16, 8, 4])
def test_what_a_run_holds_while_it_trains_is_counted(bits, tie, monkeypatch):
    config, held = settings(bits), {}
    module = importlib.import_module("nanoquant.quantize")
    make, train = module.embedding_tables, module.reconstruct_model

    def made(*arguments):
        tables = make(*arguments)
        parts = {id(part): part for table in tables.values() for part in table if part is not None}
        held[TABLES] = sum(part.nbytes for part in parts.values())
        return tables

    def trained(run, teacher, *rest):
        own, dense = (
            {w.data_ptr(): w.nbytes for w in (m.get_input_embeddings().weight, m.lm_head.weight)}
            for m in (run.model, teacher)
        )
        held[ROUNDED] = sum(size for place, size in own.items() if place not in dense)
        return train(run, teacher, *rest)

    monkeypatch.setattr(module, "embedding_tables", made)
    monkeypatch.setattr(module, "reconstruct_model", trained)
    quantize(tiny_llama(tie=tie), random_windows(8, 16).flatten(), config)
    if tie:  # the head that is tied to it is rounded with it, in the same memory
        assert len(set(held.values())) == (1 if bits == 16 else 2)
    found = terms(config, "model", tie=tie)
    assert held == {name: found[name] for name in held}
    assert held.keys() == {ROUNDED, TABLES} and (held[TABLES] > 0) == (bits != 16)


@pytest.mark.parametrize("gpu", [False, True])
def test_fewer_bits_take_more_memory_until_what_is_dense_is_gone(gpu):
    sizes = {
        bits: {need.phase: need.bytes(gpu) for need in plan(settings(bits), gpu).needs()}
        for bits in (16, 8, 4)
    }
    for phase in ("model", "pack"):
        assert sizes[16][phase] < sizes[4][phase] < sizes[8][phase], phase
    for phase in ("load", "calibrate", "blocks"):
        assert sizes[16][phase] == sizes[4][phase] == sizes[8][phase], phase


def test_tables_wait_for_their_place_where_the_model_does_not_train():
    config = settings(4, "none")
    table = table_bytes(128, 64, config.embedding, torch.float32)
    assert terms(config, "pack")[TABLES] == table > terms(settings(16, "none"), "pack")[TABLES]


def test_storages_that_losses_choose_from_count_the_largest_table():
    tiny = tiny_llama(dtype=torch.bfloat16)
    config = quick(kilobytes(fixed(tiny) + 9000), None, "measured", train="scales")
    subject = subject_of("tiny", skeleton_in(tiny.config, tiny.dtype), config, 10**6, mapped=True)
    q = quantities(subject, config, Use(0))
    assert [storage.bits for storage in q.storages] == [16, 8, 4]
    assert q.tables == table_bytes(128, 64, EmbeddingConfig(bits=8), tiny.dtype)
    assert q.rounded == 128 * 64 * 2


def test_a_storage_that_is_measured_counts_beside_what_groups_take_later():
    large = plan(settings(8), vocab_size=1 << 16)
    q = quantities(large.subject, large.config, large.use)
    several = dataclasses.replace(q, storages=(EmbeddingConfig(), *q.storages))
    alone, found = ({term.name: term.bytes for term in choose_ranks(own)} for own in (q, several))
    later = ("statistics of a block", "the initializer", "binary weights of a group")
    assert alone.pop(BEYOND) == 0
    assert found.pop(BEYOND) + sum(found[name] for name in later) == q.rounded == 4 * 64 << 16
    assert found == alone
