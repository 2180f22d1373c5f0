"""Recognition: which op a live module is, by its class and by what that computes."""

import sys
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from surgery.codecs.plain import PLAIN_DTYPES
from surgery.core.op import Op
from surgery.hosts.foreign_layers import held_by_another
from surgery.hosts.quantized import is_quantized, quantized_kinds, unready
from surgery.ops import OPS
from surgery.ops.convolution import Convolution
from surgery.ops.embedding import Embedding
from surgery.ops.linear import Linear


def op_of(module: nn.Module) -> Op | None:
    """The op of a module's weight. None if it is none of ours, or a subclass that computes otherwise."""
    for kind, name in _kinds():
        if isinstance(module, kind):
            if not _computes_as(module, kind):
                return _written_otherwise(module, name)
            return _convolution(module) if name == Convolution.name else OPS[name]
    return None


def _kinds() -> Iterator[tuple[type[nn.Module], str]]:
    for kind in quantized_kinds():
        yield kind, "linear"
    yield nn.Linear, "linear"
    yield nn.Embedding, "embedding"
    for kind in (nn.Conv1d, nn.Conv2d, nn.Conv3d):
        yield kind, "convolution"
    yield nn.MultiheadAttention, "attention"
    transformers = sys.modules.get("transformers.pytorch_utils")
    if transformers is not None:
        yield transformers.Conv1D, "conv1d"


def _computes_as(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Are the methods that say what it computes those of `kind`?"""
    told = {name: kind.__dict__.get(name) for name in ("forward", "_conv_forward")}
    return all(own is None or getattr(type(module), name) is own for name, own in told.items())


def _convolution(module: Any) -> Convolution:
    """With the module's geometry."""
    return Convolution(
        kernel=module.kernel_size,
        stride=module.stride,
        padding=module.padding,
        dilation=module.dilation,
        groups=module.groups,
        padding_mode=module.padding_mode,
    )


def _written_otherwise(module: nn.Module, name: str) -> Op | None:
    """Of a subclass with a forward of its own, where that computes an op of ours all the same."""
    if name == Embedding.name:
        return _scaled_embedding(module)
    return OPS[name] if name == Linear.name and _code(type(module).forward) == _code(_WrittenOut.forward) else None


class _WrittenOut(nn.Linear):
    """As Falcon's linear layers compute."""

    def forward(self, input: Tensor) -> Tensor:
        out = input @ self.weight.T
        if self.bias is None:
            return out
        return out + self.bias


class _Scaled(nn.Embedding):
    """As transformers' ...ScaledWordEmbedding compute, whatever the model."""

    embed_scale: Any

    def forward(self, input_ids: Tensor) -> Any:
        return super().forward(input_ids) * self.embed_scale


class _ScaledInDtype(nn.Embedding):
    """As Gemma's do."""

    embed_scale: Any

    def forward(self, input_ids: Tensor) -> Any:
        return super().forward(input_ids) * self.embed_scale.to(self.weight.dtype)


def _scaled_embedding(module: Any) -> Embedding | None:
    """Of an embedding whose forward is one of those two, as its code says: names alone promise nothing."""
    forwards = [kind.__dict__["forward"] for kind in type(module).__mro__ if "forward" in kind.__dict__]
    if forwards[1] is not nn.Embedding.forward or _code(forwards[0]) not in _SCALED:
        return None
    scale = getattr(module, "embed_scale", None)
    if isinstance(scale, Tensor) and scale.numel() == 1 and not isinstance(scale, nn.Parameter) and not scale.is_meta:
        scale = scale.to(module.weight.dtype).item()
    return Embedding(float(scale)) if isinstance(scale, int | float) else None


def _code(forward: Any) -> tuple[object, ...] | None:
    """What a function does. None where its code is not to be seen."""
    code = getattr(forward, "__code__", None)
    return None if code is None else (code.co_code, code.co_names, code.co_consts[1:])


_SCALED = (_code(_Scaled.forward), _code(_ScaledInDtype.forward))


def unfit(module: nn.Module) -> str | None:
    """Why a module of a known kind can bear no adapter all the same, and the next step; None if it can."""
    if isinstance(module, nn.MultiheadAttention) and module.in_proj_weight is None:
        return (
            "its query, key and value have weights of their own; name these in target_parameters (q_proj_weight, "
            "k_proj_weight, v_proj_weight)"
        )
    return unready(module) if is_quantized(module) else held_by_another(module) or _unfit_weight(module)


def _unfit_weight(module: nn.Module) -> str | None:
    weight = module._parameters.get(OPS["attention"].roles["weight"], module._parameters.get("weight"))
    if weight is None:
        return "its weight is computed from other tensors; remove the parametrization first"
    if isinstance(weight, nn.UninitializedParameter):
        return "its weight has no shape yet; call the model once first"
    if weight.dtype not in PLAIN_DTYPES:
        dtype = str(weight.dtype).removeprefix("torch.")
        return f"its weight is in {dtype}; floats of 16 bits or more are wanted; load the model dequantized"
    if module.__dict__.get("max_norm") is not None:  # to ask a module for what it lacks takes long
        return "its max_norm changes the weight in each forward, so that no merge holds; set it to None first"
    return None
