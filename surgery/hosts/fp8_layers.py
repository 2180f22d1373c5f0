"""Linear layers of transformers in fp8 (finegrained_fp8): their own kernels on a GPU, decoded weights on a CPU.

Their kernels quantize what comes in too; on a CPU, where there are none, nothing but the weight is rounded.
transformers is never imported here: where such a layer is, it is there already.
"""

import sys
from collections.abc import Mapping
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from surgery.codecs.fp8_block import FLOATS, Fp8Block
from surgery.core.codec import Packed

_POWERS = "torch.float8_e8m0fnu"  # scales that are powers of two, as the codec has them in bytes


class Fp8Layers:
    """FP8Linear (hosts.quantized.Kind)."""

    codecs = ("fp8_block",)

    def classes(self) -> tuple[type[nn.Module], ...]:
        loaded: Any = sys.modules.get("transformers.integrations.finegrained_fp8")
        return () if loaded is None else (loaded.FP8Linear,)

    def unready(self, module: Any) -> str | None:
        dtype = str(module.weight.dtype).removeprefix("torch.")
        if module.weight.dtype in FLOATS:
            return None
        return f"its weight is in {dtype}, not in fp8; load the model with dequantize=True"

    def tensors(self, module: Any) -> Mapping[str, Tensor]:
        scales = module.weight_scale_inv.detach()
        held = {"weight": module.weight.detach(), "weight_scale_inv": _bytes(scales)}
        return held if module.activation_scale is None else held | {"activation_scale": module.activation_scale}

    def settings(self, module: Any) -> Mapping[str, Any]:
        return {} if module.block_size is None else {"weight_block_size": tuple(module.block_size)}

    def shape(self, module: Any) -> tuple[int, int]:
        return module.out_features, module.in_features

    def compute_dtype(self, module: Any) -> torch.dtype:  # noqa: ARG002  # whatever the layer
        """Its kernels never round the weight."""
        return torch.float32

    def made(self, packed: Packed, like: Any, dtype: torch.dtype) -> nn.Module:  # noqa: ARG002  # it has none
        (Linear,) = self.classes()
        kept = isinstance(like, Linear)
        block = like.block_size if kept else packed.settings["weight_block_size"]
        with torch.device("meta"):
            made: Any = Linear(like.in_features, like.out_features, block)
        device, scales = like.weight.device, like.weight_scale_inv if kept else packed.tensors["weight_scale_inv"]
        made.weight = nn.Parameter(packed.tensors["weight"].to(device), requires_grad=False)
        made.weight_scale_inv = nn.Parameter(scales.to(device), requires_grad=False)
        if kept:
            made.activation_scheme, made.activation_scale = like.activation_scheme, like.activation_scale
        made.has_bias, made.bias = like.bias is not None, like.bias
        found: nn.Module = made.train(like.training)
        return found

    def hold(self, module: Any) -> None:
        """From now on it runs on a CPU, too."""
        if self.unready(module) is None and "forward" not in module.__dict__:  # where accelerate's hooks put theirs
            module.__dict__["forward"] = MethodType(_forward, module)

    def release(self, module: Any) -> None:
        if getattr(module.__dict__.get("forward"), "__func__", None) is _forward:
            del module.__dict__["forward"]


def _forward(module: Any, input: Tensor) -> Tensor:
    if input.device.type != "cpu":
        out: Tensor = type(module).forward(module, input)
        return out
    kind = Fp8Layers()
    packed = Packed(kind.tensors(module))
    settings = Fp8Block().read(packed.headers, kind.settings(module), packed.tensors.__getitem__)
    weight = Fp8Block().decode(packed._replace(settings=settings), input.dtype)
    return linear(input, weight, None if module.bias is None else module.bias.to(input.dtype))


def _bytes(scales: Tensor) -> Tensor:
    return scales.view(torch.uint8) if str(scales.dtype) == _POWERS else scales
