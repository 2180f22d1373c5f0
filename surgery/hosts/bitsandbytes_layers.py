"""Linear layers of bitsandbytes: how each holds its weight, as the codecs read it.

bitsandbytes is never imported here: where such a layer is, it is there already.
"""

import sys
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from surgery.codecs.bitsandbytes_config import OUTLIERS
from surgery.core.codec import Packed

_PACKS = "support_avx512bf16_for_cpu"  # bitsandbytes' switch: with it, evaluating on some CPUs rounds scales in place
_PACKED_BEFORE = "surgery_packed_before"


class BitsandbytesLayers:
    """Linear4bit and Linear8bitLt (hosts.quantized.Kind)."""

    codecs = ("bnb4", "bnb8")

    def classes(self) -> tuple[type[nn.Module], ...]:
        loaded: Any = sys.modules.get("bitsandbytes.nn")
        return () if loaded is None else (loaded.Linear4bit, loaded.Linear8bitLt)

    def unready(self, module: Any) -> str | None:
        if _is_8bit(module):
            if module.state.has_fp16_weights:
                return "it quantizes 16-bit weights anew in each forward; make it with has_fp16_weights=False"
            return None if _scales(module) is not None else "it is not quantized yet; move it to its device first"
        state = _quant_state(module)
        if state is None:
            return "it is not quantized yet; move it to its device first"
        if getattr(state, "packing_format_for_cpu", False):
            return (
                "bitsandbytes has rounded its scales when it ran in eval mode on this CPU; load the model again, and "
                "add the adapter before it runs"
            )
        return None

    def tensors(self, module: Any) -> Mapping[str, Tensor]:
        beside: Mapping[str, Tensor]
        if _is_8bit(module):
            beside = {"SCB": _scales(module).to(module.weight.device)}
        else:
            beside = {f"weight.{part}": values for part, values in _quant_state(module).as_dict(packed=True).items()}
        return {"weight": module.weight.detach().as_subclass(torch.Tensor), **beside}

    def settings(self, module: Any) -> Mapping[str, Any]:  # noqa: ARG002  # its tensors tell
        return {}

    def shape(self, module: Any) -> tuple[int, int]:
        return module.out_features, module.in_features

    def compute_dtype(self, module: Any) -> torch.dtype:
        """The kernels of 8 bits never round the weight, so that it is float32."""
        dtype: torch.dtype = torch.float32
        if not _is_8bit(module):
            dtype = module.compute_dtype or _quant_state(module).dtype
        return dtype

    def made(self, packed: Packed, like: Any, dtype: torch.dtype) -> nn.Module:
        layers = sys.modules["bitsandbytes.nn"]
        made = _made_8bit(layers, packed, like) if "SCB" in packed.tensors else _made_4bit(layers, packed, like, dtype)
        made.bias = like.bias
        never_round_scales(made)
        found: nn.Module = made.train(like.training)
        return found

    def hold(self, module: nn.Module) -> None:
        """From now on it runs in eval mode as in training: its scales stay."""
        if _is_8bit(module):
            _bring_along(module)
        if module.__dict__.get(_PACKS):
            module.__dict__.update({_PACKS: False, _PACKED_BEFORE: module.__dict__[_PACKS]})

    def release(self, module: nn.Module) -> None:
        before = module.__dict__.pop(_PACKED_BEFORE, None)
        if before is not None:
            module.__dict__[_PACKS] = before


def never_round_scales(module: nn.Module) -> None:
    """Its scales stay for good, however it runs."""
    if module.__dict__.get(_PACKS):
        module.__dict__[_PACKS] = False


def _bring_along(module: Any) -> None:
    """What lies beside its codes, which bitsandbytes 0.50 leaves behind where the model that holds them is moved."""
    codes = module.weight.data
    for holder in (module.weight, module.state):
        if holder.SCB is not None and holder.SCB.device != codes.device:
            holder.CB, holder.SCB = codes, holder.SCB.to(codes.device)


def _made_4bit(layers: Any, packed: Packed, like: Any, dtype: torch.dtype) -> Any:
    codes, settings, device = packed.tensors["weight"], packed.settings, like.weight.device
    made = layers.Linear4bit(
        *_sizes(like),
        compute_dtype=dtype,
        compress_statistics="nested_offset" in settings,
        quant_type=settings["quant_type"],
        quant_storage=codes.dtype,
        device="meta",
    )
    state = {role.removeprefix("weight."): one for role, one in packed.tensors.items() if role != "weight"}
    made.weight = layers.Params4bit.from_prequantized(codes, state, device=device, module=made)
    return made


def _made_8bit(layers: Any, packed: Packed, like: Any) -> Any:
    threshold = like.state.threshold if isinstance(like, layers.Linear8bitLt) else OUTLIERS
    made = layers.Linear8bitLt(*_sizes(like), has_fp16_weights=False, threshold=threshold, device="meta")
    codes, scales = (packed.tensors[role].to(like.weight.device) for role in ("weight", "SCB"))
    made.weight = layers.Int8Params(codes, requires_grad=False, has_fp16_weights=False, CB=codes, SCB=scales)
    return made


def _sizes(like: Any) -> tuple[int, int, bool]:
    return like.in_features, like.out_features, like.bias is not None


def _is_8bit(module: Any) -> bool:
    return isinstance(module, sys.modules["bitsandbytes.nn"].Linear8bitLt)


def _scales(module: Any) -> Any:
    """SCB, which the first forward moves."""
    found = getattr(module.weight, "SCB", None)
    return found if found is not None else module.state.SCB


def _quant_state(module: Any) -> Any:
    found = getattr(module.weight, "quant_state", None)
    return found if found is not None else module.quant_state
