"""Fine-tuning of a packed model: LoRA beside its linears, or their scales and the norms; signs and indices stay.

The loss is that of the next token on the user's text or, with a dense teacher, the divergence of the logits (Eq. 11).
Held-out windows choose the state that is kept; the untouched one is a candidate. They are measured before what trained
in float32 is rounded to the stored dtype. Merge rules: an adapter stays beside
the checkpoint, trained scales are part of it. Shapes: N windows, T tokens a window, V vocabulary.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from nanoquant.adapters import checkpoint_id, require_peft
from nanoquant.best_state import BestState, ModelReport
from nanoquant.block_tuning import tensor_group
from nanoquant.course import Course
from nanoquant.decoder import evaluation_mode
from nanoquant.divergence import held_out_divergence, logits_divergence
from nanoquant.evaluation.perplexity import check_length, perplexity
from nanoquant.fine_tune_config import ALL, FineTuneConfig
from nanoquant.kept_logits import as_rows, collate
from nanoquant.non_finite import locate_non_finite
from nanoquant.packed_layers import Packed, packed_entry, packed_modules, parts_of
from nanoquant.recorder import UNRECORDED
from nanoquant.residual_start import dense_weight, residual_start
from nanoquant.resuming import Order
from nanoquant.student import norm_parameters


class TuningObjective(nn.Module):
    """Loss of the next token, or divergence from a teacher, which is no submodule and never trains."""

    name = "fine-tuning"

    def __init__(
        self, student: nn.Module, teacher: nn.Module | None, groups: list[dict[str, Any]]
    ) -> None:
        super().__init__()
        self.student, self._teacher, self.groups = student, [teacher], groups

    def parameter_groups(self) -> list[dict[str, Any]]:
        """As given."""
        return self.groups

    def forward(self, batch: Sequence[Tensor]) -> Tensor:
        """Mean over the tokens of a batch of windows (n, T)."""
        (teacher,) = self._teacher
        if teacher is not None:
            return logits_divergence(self.student, teacher, batch)
        (windows,) = batch
        logits = self.student(input_ids=windows, use_cache=False).logits  # (n, T, V)
        return F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), windows[:, 1:].flatten())

    def held_out(self, windows: Tensor, precision: str) -> float:
        """The same of windows (N, T), without gradients."""
        (teacher,) = self._teacher
        if teacher is not None:
            loader = DataLoader(as_rows(windows), collate_fn=collate)
            return held_out_divergence(self.student, teacher, loader, precision)
        device = next(self.student.parameters()).device.type
        with torch.autocast(device, torch.bfloat16, enabled=precision == "bf16-mixed"):
            found = perplexity(self.student, windows)
        return found.nll.sum().item() / found.tokens


def fine_tune(
    model: nn.Module,
    windows: Tensor,
    held_out: Tensor,
    config: FineTuneConfig,
    teacher: nn.Module | None = None,
    *,
    on_step: Callable[[int, float], None] | None = None,
    loggers: list[Any] | None = None,
) -> tuple[nn.Module, ModelReport]:
    """Train what ``config.train`` says in place, and leave it in its best state, frozen.

    Args:
        model: packed, as loaded.
        windows: training tokens (N, T).
        held_out: those that choose the state.
        config: what trains and how.
        teacher: dense model of the same vocabulary, on the same device; None: the text itself.
        on_step: called with (step, loss).
        loggers: Lightning loggers.

    Returns:
        The model, a ``PeftModel`` where an adapter was trained, and losses and held-out losses.

    Raises:
        ValueError: the model is not packed, a target is unknown, 8-bit activations are on, peft is missing or too old,
            or the teacher does not fit.
        FloatingPointError: the untouched model's loss is not finite, or training stays so.
    """
    check_model(model, config, teacher)
    precision = "bf16-mixed" if model.dtype == torch.bfloat16 else "32-true"
    model.requires_grad_(False)
    cards = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
    with torch.random.fork_rng(cards):
        torch.manual_seed(config.seed)
        student = add_adapter(model, config) if config.train == "lora" else model
    groups = (
        adapter_groups(student, config) if config.train == "lora" else scale_groups(model, config)
    )
    objective = TuningObjective(student, teacher, groups)
    still = evaluation_mode(teacher) if teacher is not None else nullcontext()
    with evaluation_mode(student), still, wide(groups):
        if starts_at_residual(config, teacher):
            residual_start(
                student, teacher, windows, lambda: objective.held_out(held_out, precision)
            )
        report = train(objective, windows, held_out, config, precision, on_step, loggers)
    student.requires_grad_(False)
    if config.train == "scales" and (checkpoint_id(model) is not None):
        model.config.quantization_config.checkpoint_id = None  # it is that of other scales
    return student, report


def train(
    objective: TuningObjective,
    windows: Tensor,
    held_out: Tensor,
    config: FineTuneConfig,
    precision: str,
    on_step: Callable[[int, float], None] | None,
    loggers: list[Any] | None,
) -> ModelReport:
    """Run the loop with looks at the held-out windows, and put the best state back."""
    parameters = [parameter for group in objective.groups for parameter in group["params"]]
    keeper = BestState(
        parameters,
        measure=lambda: objective.held_out(held_out, precision),
        locate=lambda: locate_non_finite(objective, [held_out[:1]], precision),
        report=ModelReport(),
    )
    order = Order(len(windows), config.batch, config.epochs, config.seed)
    peak = config.lora_lr if config.train == "lora" else config.scale_lr
    course = Course(
        *(keeper, {}, UNRECORDED, order.steps, config.evaluations),
        rate=lambda step: peak * config.optimizer.rate(step, order.steps),
        on_step=on_step,
        state=None,
    )
    course.run(objective, as_rows(windows), order, config.optimizer, precision, loggers)
    return keeper.report


def check_model(model: nn.Module, config: FineTuneConfig, teacher: nn.Module | None) -> None:
    """Raise ValueError, before anything is changed, unless the model can train as the config says."""
    layers = packed_modules(model)
    if not layers:
        raise ValueError(
            "no linear of the model is packed; load a checkpoint of nanoquant, or fine-tune the dense model with peft"
        )
    rounded = [name for name, layer in layers.items() if getattr(layer, "int8_activations", False)]
    if rounded:
        raise ValueError(
            f"{rounded[0]} has 8-bit activations, which have no gradients; call use_exact_activations(model) first"
        )
    check_length(model, config.length)
    if teacher is not None and teacher.config.vocab_size != model.config.vocab_size:
        raise ValueError(
            f"the teacher has {teacher.config.vocab_size} tokens, the model {model.config.vocab_size}; give the dense "
            "model that it was made from"
        )
    if config.start == "residual" and teacher is None:
        raise ValueError("start=residual needs the dense model as teacher; give it, or start=zero")
    if config.train == "lora":
        require_peft()
        for name in targets_of(model, config):
            if starts_at_residual(config, teacher):
                dense_weight(teacher, name, layers[name])


def starts_at_residual(config: FineTuneConfig, teacher: nn.Module | None) -> bool:
    """Whether LoRA begins at a part of the error of the packed weights."""
    return config.train == "lora" and teacher is not None and config.start != "zero"


def targets_of(model: nn.Module, config: FineTuneConfig) -> list[str]:
    """Full names of the packed linears that get LoRA; dense ones and the head get none.

    Raises:
        ValueError: one is not the last name of a packed linear.
    """
    head = model.get_output_embeddings()
    layers = [name for name, layer in packed_modules(model).items() if layer is not head]
    known = sorted({name.rpartition(".")[2] for name in layers})
    asked = known if config.targets == ALL else config.targets.split(",")
    for target in asked:
        if target not in known:
            near = difflib.get_close_matches(target, known, n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise ValueError(
                f"targets has {target!r}, which is no packed linear; allowed: {ALL} or {', '.join(known)}{hint}"
            )
    return [name for name in layers if name.rpartition(".")[2] in asked]


def add_adapter(model: nn.Module, config: FineTuneConfig) -> nn.Module:
    """The model with new LoRA beside the packed linears that the config names."""
    from peft import LoraConfig, get_peft_model

    settings = {"r": config.rank, "lora_alpha": config.rank, "task_type": "CAUSAL_LM"}
    lora = LoraConfig(target_modules=targets_of(model, config), **settings)
    # in the dtype of the scales, which it is saved in; it trains in float32
    return get_peft_model(model, lora, autocast_adapter_dtype=False)


def adapter_groups(student: nn.Module, config: FineTuneConfig) -> list[dict[str, Any]]:
    """Low-rank matrices, which peft has made ready to train."""
    parameters = [p for p in student.parameters() if p.requires_grad]
    return [{"params": parameters, "lr": config.lora_lr}]


def scale_groups(model: nn.Module, config: FineTuneConfig) -> list[dict[str, Any]]:
    """Numbers of the packed linears and norms beside and above them, made ready to train."""
    layers = packed_modules(model)
    vectors = [tensor for layer in layers.values() for tensor in numbers_of(layer)]
    vectors += norm_parameters(model, layers)
    for tensor in vectors:
        tensor.requires_grad_(True)
    return [tensor_group(tensor, config.scale_lr, relative=True) for tensor in vectors]


def numbers_of(layer: Packed) -> list[nn.Parameter]:
    """Scales, or codebooks and scales, and the bias."""
    names = (*parts_of(packed_entry(layer))[1], "bias")
    return [tensor for name in names if (tensor := getattr(layer, name)) is not None]


@contextmanager
def wide(groups: list[dict[str, Any]]) -> Iterator[None]:
    """Context in which what trains is float32; afterwards it is rounded to the dtype it had."""
    dtypes = [(p, p.dtype) for group in groups for p in group["params"]]
    for parameter, _ in dtypes:
        parameter.data = parameter.data.float()
    try:
        yield
    finally:
        for parameter, dtype in dtypes:
            parameter.data = parameter.data.to(dtype)
