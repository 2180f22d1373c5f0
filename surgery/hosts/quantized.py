"""Linear layers of bitsandbytes in a live model: how each holds its weight, as the codecs read it.

bitsandbytes is never imported here: where such a layer is, it is there already.
"""

import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from surgery.codecs import codec_of, packed_of
from surgery.core.codec import Packed
from surgery.errors import StateError, printable

_PACKS = "support_avx512bf16_for_cpu"  # bitsandbytes' switch of what `keep_scales` is about
_PACKED_BEFORE = "surgery_packed_before"


def quantized_kinds() -> Iterator[type[nn.Module]]:
    """The classes of bitsandbytes' linear layers; none where it is not imported."""
    loaded: Any = sys.modules.get("bitsandbytes.nn")
    if loaded is not None:
        yield loaded.Linear4bit
        yield loaded.Linear8bitLt


def is_quantized(module: nn.Module) -> bool:
    return type(module) is not nn.Linear and isinstance(module, tuple(quantized_kinds()))


def unready(module: Any) -> str | None:
    """Why such a layer cannot bear an adapter as it is, and the next step; None if it can."""
    if _is_8bit(module):
        if module.state.has_fp16_weights:
            return "it quantizes 16-bit weights anew in each forward; make it with has_fp16_weights=False"
        return None if _scales(module) is not None else "it is not quantized yet; move it to its device first"
    state = _quant_state(module)
    if state is None:
        return "it is not quantized yet; move it to its device first"
    if getattr(state, "packing_format_for_cpu", False):
        return (
            "bitsandbytes has rounded its scales when it ran in eval mode on this CPU; load the model again, and add "
            "the adapter before it runs"
        )
    return None


def packed_of_layer(module: Any, where: str = "") -> Packed:
    """The tensors that hold its weight, named as a file names them. StateError where `unready` has something to say."""
    why = unready(module)
    if why is not None:
        raise StateError(f"{printable(where)}: {why}")
    beside: Mapping[str, Tensor]
    if _is_8bit(module):
        beside = {"SCB": _scales(module)}
    else:
        beside = {f"weight.{part}": values for part, values in _quant_state(module).as_dict(packed=True).items()}
    return packed_of({"weight": module.weight.detach().as_subclass(torch.Tensor), **beside}, printable(where))


def shape_of_layer(module: Any) -> tuple[int, int]:
    """(out, in) of the weight, whatever the shape of its codes."""
    return module.out_features, module.in_features


def compute_dtype(module: Any) -> torch.dtype:
    """What its weight is decoded to when it runs. The kernels of 8 bits never round it, so that it is float32."""
    dtype: torch.dtype = torch.float32
    if not _is_8bit(module):
        dtype = module.compute_dtype or _quant_state(module).dtype
    return dtype


def own_dtype(module: Any) -> torch.dtype | None:
    """What its weight was in before it was quantized; None where nothing tells."""
    packed = packed_of_layer(module)
    return codec_of(packed, "").dtype(packed.settings)


def codec_name(module: nn.Module) -> str:
    return codec_of(packed_of_layer(module), "").name


def decoded_to(module: nn.Module, dtype: torch.dtype) -> Tensor:
    """Its weight [out, in]."""
    packed = packed_of_layer(module)
    return codec_of(packed, "").decode(packed, dtype)


def decoded(module: nn.Module) -> Tensor:
    """The same in the dtype that it computes with."""
    return decoded_to(module, compute_dtype(module))


def decoder(module: nn.Module) -> Callable[[nn.Module], Tensor] | None:
    """What gives the weight of a module that holds it otherwise than plainly."""
    return decoded if is_quantized(module) else None


def keep_scales(module: nn.Module) -> None:
    """From now on it runs in eval mode as in training: on some CPUs bitsandbytes would round its scales, in place."""
    if module.__dict__.get(_PACKS):
        module.__dict__.update({_PACKS: False, _PACKED_BEFORE: module.__dict__[_PACKS]})


def release_scales(module: nn.Module) -> None:
    """It runs as before `keep_scales`."""
    before = module.__dict__.pop(_PACKED_BEFORE, None)
    if before is not None:
        module.__dict__[_PACKS] = before


def never_round_scales(module: nn.Module) -> None:
    """The same for good."""
    if module.__dict__.get(_PACKS):
        module.__dict__[_PACKS] = False


def _is_8bit(module: Any) -> bool:
    return isinstance(module, sys.modules["bitsandbytes.nn"].Linear8bitLt)


def _scales(module: Any) -> Any:
    """SCB, which the first forward moves."""
    found = getattr(module.weight, "SCB", None)
    return found if found is not None else module.state.SCB


def _quant_state(module: Any) -> Any:
    found = getattr(module.weight, "quant_state", None)
    return found if found is not None else module.quant_state
