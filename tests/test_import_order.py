"""The package reads from top to bottom: a file imports only from files above it."""

import ast
from pathlib import Path

import pytest

import nanoquant

PACKAGE = Path(nanoquant.__file__).parent

ORDER = (
    "register",
    "__init__",
    "progress",
    "commit",
    "processes",
    "json_files",
    "lock",
    "output_folder",
    "stored_tensors",
    "checkpoint_files",
    "mapped",
    "shards",
    "tensor_file",
    "heap",
    "recorder",
    "offload",
    "decoder",
    "architectures",
    "roles",
    "digest",
    "twin",
    "recompute",
    "segments",
    "units",
    "activation_memory",
    "chat",
    "data",
    "mixture",
    "second_moment",
    "importance",
    "importance_store",
    "calibration",
    "budget",
    "allocation",
    "binary",
    "linear",
    "admm",
    "product_budget",
    "codebooks",
    "kmeans",
    "product",
    "product_linear",
    "methods",
    "layer_records",
    "compiling",
    "optimizer",
    "resuming",
    "data_parallel",
    "non_finite",
    "fit_result",
    "training",
    "early_stop",
    "block_tuning",
    "activations",
    "schedules",
    "block_config",
    "block_reconstruction",
    "dense_prefix",
    "divergence",
    "kept_logits",
    "sensitivity",
    "student",
    "best_state",
    "model_state",
    "course",
    "sharding",
    "model_reconstruction",
    "packed_linear",
    "shared_launch",
    "packed_parallel",
    "packed_weight",
    "packed_tensor",
    "product_packed",
    "product_tensor",
    "packed_layers",
    "embedding",
    "model_embeddings",
    "sizes",
    "hf_quantizer",
    "checkpoint",
    "adapters",
    "lora",
    "evaluation.__init__",
    "evaluation.perplexity",
    "int8_activations",
    "fine_tune_config",
    "residual_start",
    "fine_tuning",
    "generation_settings",
    "sampling",
    "self_text",
    "streaming",
    "generate",
    "config",
    "text_plan",
    "text",
    "file_budget",
    "ranks",
    "shared_blocks",
    "unfinished",
    "disk",
    "known_windows",
    "phases",
    "quantize",
    "transform",
    "console",
    "sources",
    "verification",
    "figures",
    "prompts",
    "memory",
    "tracking.__init__",
    "tracking.folder",
    "tracking.sinks",
    "tracking.layout",
    "tracking.dashboard",
    "tracking.loggers",
    "tracking.tracker",
    "job_config",
    "estimate.__init__",
    "estimate.subject",
    "estimate.files",
    "estimate.terms",
    "estimate.work",
    "estimate.quantities",
    "estimate.initialization",
    "estimate.student",
    "estimate.memory",
    "estimate.limits",
    "measuring",
    "hub.__init__",
    "hub.reproduce",
    "hub.card",
    "hub.publish",
    "finish",
    "job",
    "resume",
    "evaluation.tasks",
    "evaluation.local_data",
    "evaluation.protocols",
    "evaluation.request",
    "evaluation.agreement",
    "evaluation.zero_shot",
    "evaluation.record",
    "evaluation.compare",
    "benchmark.__init__",
    "benchmark.shapes",
    "benchmark.config",
    "benchmark.timing",
    "benchmark.linears",
    "benchmark.correctness",
    "benchmark.speed",
    "benchmark.setup",
    "benchmark.model",
    "benchmark.process",
    "benchmark.run",
    "benchmark.report",
    "benchmark.command",
    "baselines.__init__",
    "baselines.config",
    "baselines.factorize",
    "baselines.layers",
    "baselines.packed_integers",
    "baselines.target",
    "baselines.integers",
    "baselines.binary",
    "baselines.registry",
    "baselines.run",
    "baselines.records",
    "baselines.report",
    "baselines.command",
    "advice.__init__",
    "advice.catalogue",
    "advice.anatomy",
    "advice.config",
    "advice.options",
    "advice.memory",
    "advice.published",
    "advice.rows",
    "advice.rules",
    "advice.commands",
    "advice.reasons",
    "advice.recommend",
    "advice.show",
    "advice.command",
    "doctor.__init__",
    "doctor.checks",
    "doctor.command",
    "hub.command",
    "interchange.__init__",
    "interchange.words",
    "interchange.read",
    "interchange.convert",
    "interchange.command",
    "serving.__init__",
    "serving.command",
    "serving.vllm_linear",
    "serving.vllm_plugin",
    "report.__init__",
    "report.config",
    "report.run_files",
    "report.content",
    "report.style",
    "report.measures",
    "report.layers",
    "report.curves",
    "report.spectra",
    "report.cost",
    "report.evaluations",
    "report.quality",
    "report.about",
    "report.page",
    "report.command",
    "commands",
    "estimate.operations",
    "estimate.machine",
    "estimate.request",
    "estimate.size",
    "estimate.estimate",
    "estimate.show",
    "estimate.command",
    "evaluation.command",
    "yaml_files",
    "parsers",
    "ablation.__init__",
    "ablation.plan",
    "ablation.cells",
    "ablation.table",
    "ablation.plots",
    "cli",
    "__main__",
)

AFTERWARDS = {
    ("packed_linear", "packed_tensor"),
    ("packed_linear", "shared_launch"),
    ("product_packed", "product_tensor"),
}
"""Imports of later files inside a function; the earlier file must work without them."""

HEAVY = {"torchao", "lightning", "triton", "datasets", "wandb", "jsonargparse", "peft", "vllm"}
MAY_IMPORT = {
    "packed_parallel": {"torchao"},
    "packed_weight": {"torchao"},
    "packed_tensor": {"torchao"},
    "product_tensor": {"torchao"},
    "config": {"torchao"},
    "transform": {"torchao"},
    "baselines.packed_integers": {"torchao"},
    "data_parallel": {"lightning"},
    "training": {"lightning"},
    "early_stop": {"lightning"},
    "parsers": {"jsonargparse"},
    "lora": {"peft"},
    "serving.vllm_linear": {"vllm"},
}
"""Files that import heavy libraries at their top; others do it where they use them."""


def files():
    """Every file below the package as Python would name it: "admm", "benchmark.timing"."""
    paths = (path.relative_to(PACKAGE).with_suffix("") for path in PACKAGE.rglob("*.py"))
    return sorted(".".join(path.parts) for path in paths)


def imported(nodes):
    """Names of modules that import statements among ``nodes`` mention, and of what they take from a package."""
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def own(names):
    """Files of the package among the names of modules."""
    prefix = "nanoquant."
    return {n.removeprefix(prefix) for n in names if n.startswith(prefix)} & set(files())


def parse(name):
    return ast.parse(PACKAGE.joinpath(*name.split(".")).with_suffix(".py").read_text())


def type_checking(tree):
    """Nodes that only type checkers read."""
    return {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and getattr(node.test, "id", "") == "TYPE_CHECKING"
        for inner in ast.walk(node)
    }


def test_the_order_lists_every_file_once():
    assert len(set(ORDER)) == len(ORDER)
    assert set(files()) <= set(ORDER), "add the new file to ORDER, where it belongs"


@pytest.mark.parametrize("stem", files())
def test_a_file_imports_only_from_files_above_it(stem):
    tree = parse(stem)
    skipped = type_checking(tree)
    names = own(imported(node for node in ast.walk(tree) if id(node) not in skipped))
    allowed = set(ORDER[: ORDER.index(stem)]) | {b for a, b in AFTERWARDS if a == stem}
    assert names <= allowed
    assert not own(imported(tree.body)) & {b for a, b in AFTERWARDS if a == stem}


@pytest.mark.parametrize("stem", files())
def test_heavy_libraries_are_imported_at_the_top_only_where_they_are_the_point(stem):
    top = {name.split(".")[0] for name in imported(parse(stem).body)}
    assert top & HEAVY <= MAY_IMPORT.get(stem, set())


def test_the_kernels_do_not_know_the_library():
    folder = PACKAGE.parent / "kernels" / "nanoquant_kernels"
    for path in folder.glob("*.py"):
        assert not any(
            name.split(".")[0] == "nanoquant"
            for name in imported(ast.walk(ast.parse(path.read_text())))
        )
