"""LoRA of peft on packed linears; imported right after peft itself.

Peft has no public door for layers of other libraries that outlives a saved configuration, so three private places are
widened: which layers ``target_modules="all-linear"`` means, which class wraps a layer, and whether a model may be
merged. What is not packed goes on as before.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from peft.tuners import tuners_utils
from peft.tuners.lora import LoraConfig, LoraModel
from peft.tuners.lora.layer import Linear
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from nanoquant.adapters import require_peft
from nanoquant.packed_layers import is_packed, packed_modules

STARTS = (True, False, "gaussian", "orthogonal", "eva")
"""Values of ``init_lora_weights`` that leave the packed weight as it is."""
NO_MERGE = (
    "an adapter can't be merged into signs or codebooks: the sum has no packed form. Keep it beside the checkpoint, "
    "which is how it loads, or call model.dequantize() on the loaded checkpoint first and merge into that dense model"
)


class PackedLoraLinear(Linear):
    """A packed linear that does not train and LoRA beside it: y = packed(x) + scaling B (A x)."""

    def _get_in_out_features(self, module: nn.Module) -> tuple[int, int]:
        """Inputs and outputs of the packed layer."""
        return module.in_features, module.out_features

    def resolve_lora_variant(self, **settings: object) -> None:
        """Plain LoRA, or nothing.

        Raises:
            ValueError: DoRA or another variant is asked for.
        """
        variant = super().resolve_lora_variant(**settings)
        if variant is not None:
            raise ValueError(
                f"packed linears take plain LoRA alone, got {type(variant).__name__}; leave that option out"
            )

    def update_layer(
        self, adapter_name: str, r: int, lora_alpha: int, config: LoraConfig, **settings: object
    ) -> None:
        """Add an adapter.

        Raises:
            ValueError: its start would change the packed weight.
        """
        if config.init_lora_weights not in STARTS:
            raise ValueError(
                f"init_lora_weights={config.init_lora_weights!r} changes the base weight, which signs can't follow; "
                f"allowed: {', '.join(map(str, STARTS))}"
            )
        super().update_layer(adapter_name, r, lora_alpha, config=config, **settings)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Never.

        Raises:
            ValueError: says what to do instead.
        """
        raise ValueError(NO_MERGE)

    def _load_from_state_dict(
        self, state_dict: dict[str, Tensor], prefix: str, *settings: object
    ) -> None:
        """Load, after a look at what the adapters were made for.

        Raises:
            ValueError: an adapter is of another rank or shape; names both.
        """
        for part, place, side in (("lora_A", 1, "inputs"), ("lora_B", 0, "outputs")):
            for adapter, own in getattr(self, part).items():
                key = f"{prefix}{part}.{adapter}.weight"
                given = state_dict.get(key, own.weight)
                made = tuple(given.shape)
                if len(made) != 2 or not given.isfinite().all():
                    raise ValueError(
                        f"{key} has shape {made} or numbers that are not finite: the adapter is damaged; copy it again"
                    )
                if made != tuple(own.weight.shape):
                    rank, width = made[1 - place], made[place]
                    raise ValueError(
                        f"{key}: the adapter was made for rank {rank} and {width} {side}, but here are rank "
                        f"{own.weight.shape[1 - place]} and {own.weight.shape[place]}; load the model and "
                        "configuration that it was made for"
                    )
        super()._load_from_state_dict(state_dict, prefix, *settings)


def include_packed(original: Callable[[Any, nn.Module], Any]) -> Callable[[Any, nn.Module], Any]:
    """Let "all-linear" mean packed layers too, except the head, which peft leaves out as well."""

    def include(config: Any, model: nn.Module) -> Any:  # noqa: ANN401
        asked = str(getattr(config, "target_modules", "")).lower() == "all-linear"
        config = original(config, model)
        if asked:
            head = getattr(model, "get_output_embeddings", lambda: None)()
            wrapped = tuple(
                f"{n}." for n, m in model.named_modules() if isinstance(m, BaseTunerLayer)
            )
            config.target_modules |= {
                name
                for name, layer in packed_modules(model).items()
                if layer is not head and not name.startswith(wrapped)
            }
        return config

    return include


def wrap_packed(original: Callable[..., nn.Module]) -> Callable[..., nn.Module]:
    """Wrap packed layers, and linears with packed weights, in :class:`PackedLoraLinear`."""

    def create(
        lora_config: LoraConfig, adapter_name: str, target: nn.Module, **settings: object
    ) -> nn.Module:
        base = target.get_base_layer() if isinstance(target, BaseTunerLayer) else target
        if not is_packed(getattr(base, "weight", None)):
            return original(lora_config, adapter_name, target, **settings)
        require_peft()
        return PackedLoraLinear(target, adapter_name, config=lora_config, **settings)

    return create


def refuse_merge(original: Callable[[LoraModel], None]) -> Callable[[LoraModel], None]:
    """Refuse before the first layer is touched."""

    def check(self: LoraModel) -> None:
        if any(isinstance(module, PackedLoraLinear) for module in self.model.modules()):
            raise ValueError(NO_MERGE)
        original(self)

    return check


# read all before any is replaced: a peft that lacks one stays as it is
_meaning, _create, _check = (
    include_packed(tuners_utils._maybe_include_all_linear_layers),
    wrap_packed(LoraModel._create_new_module),
    refuse_merge(LoraModel._check_merge_allowed),
)
tuners_utils._maybe_include_all_linear_layers = _meaning
LoraModel._create_new_module, LoraModel._check_merge_allowed = staticmethod(_create), _check
