"""The CPU loops are right on ARM, and on x86 without AVX-512 or AVX: cross-compiled, run by an emulator."""

import pytest
import test_kernels_cpu
import test_kernels_int8
import test_kernels_table
import torch
from emulator import Library, build, first_of

from nanoquant_kernels import cpu, cpu_int8, table_ops

MACHINES = {
    "arm": ("aarch64", (), ("plain", "neon")),
    "x86 of 2013": ("x86_64", ("-cpu", "Haswell"), ("plain", "avx2")),
    "x86 without FMA": ("x86_64", ("-cpu", "Haswell,-fma"), ("plain",)),
    "any x86": ("x86_64", ("-cpu", "qemu64"), ("plain",)),
}
"""Architecture, options of the emulator, and the instruction paths that the loops find there."""
PATHS = [(machine, path) for machine, (*_, paths) in MACHINES.items() for path in paths]

INT8 = {m: ("plain", "avx2") if "2013" in m or "FMA" in m else ("plain",) for m in MACHINES}
"""Paths of the loop over 8-bit activations, whose AVX2 needs no FMA."""


@pytest.fixture(scope="module")
def libraries(tmp_path_factory):
    """The loops of each machine asked for, compiled once for each architecture."""
    programs, started = {}, {}

    def library(machine):
        architecture, options, _ = MACHINES[machine]
        compiler = first_of(f"{architecture}-linux-gnu-g++")
        emulator = first_of(f"qemu-{architecture}-static", f"qemu-{architecture}")
        if not compiler or not emulator:
            pytest.skip(f"needs {architecture}-linux-gnu-g++ and qemu-{architecture} (qemu-user)")
        if architecture not in programs:
            programs[architecture] = build(compiler, tmp_path_factory.mktemp(architecture))
        if machine not in started:
            started[machine] = Library(emulator, *options, programs[architecture])
        return started[machine]

    yield library
    for each in started.values():
        each.close()


@pytest.fixture
def on(libraries, monkeypatch):
    """Puts the loops of an emulated machine in the place of this one's."""

    def use(machine):
        library = libraries(machine)
        for module in (cpu, table_ops, cpu_int8):
            monkeypatch.setattr(module, "library", lambda: library)
        for module in (cpu, table_ops):
            monkeypatch.setattr(module, "available_paths", library.available_paths)
        monkeypatch.setattr(cpu_int8, "available_int8_paths", library.available_int8_paths)

    return use


@pytest.mark.parametrize("machine", MACHINES)
def test_a_machine_finds_the_paths_that_it_can_run(machine, libraries):
    assert libraries(machine).available_paths() == MACHINES[machine][2]
    assert libraries(machine).available_int8_paths() == INT8[machine]


@pytest.mark.parametrize("dtype", test_kernels_cpu.ROUNDING, ids=str)
@pytest.mark.parametrize(("machine", "path"), PATHS)
def test_packed_signs_give_the_dense_product(machine, path, dtype, on):
    on(machine)
    for shape in test_kernels_cpu.SHAPES:
        test_kernels_cpu.test_every_path_gives_the_dense_product(shape, dtype, path)


@pytest.mark.parametrize("machine", MACHINES)
def test_8_bit_activations_give_the_reference(machine, on):
    on(machine)
    for path in INT8[machine]:
        for shape in test_kernels_int8.WIDE:
            test_kernels_int8.test_every_path_gives_the_reference(shape, torch.bfloat16, path)
            test_kernels_int8.test_sums_of_integers_are_exact(shape, path)
        test_kernels_int8.test_the_largest_sums_do_not_overflow(path)
        test_kernels_int8.test_what_is_not_finite_makes_its_own_token_nan(float("nan"), path)
        test_kernels_int8.test_zeros_and_what_is_next_to_nothing_give_the_bias(path)


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("dtype", test_kernels_table.ROUNDING, ids=str)
@pytest.mark.parametrize(("machine", "path"), PATHS)
def test_tables_give_the_dense_product(machine, path, dtype, bits, on):
    on(machine)
    for shape in test_kernels_table.SHAPES:
        test_kernels_table.test_every_path_gives_the_dense_product(shape, dtype, path, bits)


@pytest.mark.parametrize(("machine", "path"), PATHS)
def test_odd_widths_and_what_is_not_a_number_are_as_on_this_machine(machine, path, on):
    on(machine)
    for d in (1, 15, 17, 50):
        test_kernels_table.test_widths_that_fill_no_vector_work_at_8_bits(d, path)
    test = "test_what_is_not_a_number_reaches_every_output_of_its_token_and_no_other"
    getattr(test_kernels_cpu, test)(path)
    test = "test_what_is_not_finite_reaches_every_output_of_its_token_and_no_other"
    for bits in (8, 4):
        getattr(test_kernels_table, test)(path, bits)


@pytest.mark.parametrize("machine", MACHINES)
def test_rounding_threads_and_empty_batches_are_as_on_this_machine(machine, on):
    on(machine)
    for dtype in (torch.float16, torch.bfloat16):
        test_kernels_cpu.test_every_value_of_the_short_dtypes_is_read_and_rounded_right(dtype)
    test_kernels_cpu.test_threads_do_not_change_a_bit()
    test_kernels_cpu.test_views_and_empty_batches_work()
