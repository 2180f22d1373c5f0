"""Exactly: what a model gives otherwise where its adapters are merged exactly, and rounded once.

The factors lie on a grid then, and each weight is rounded to its dtype. Both are known, element by element.
"""

from collections.abc import Callable, Mapping
from functools import partial

import torch
from torch import Tensor, nn

from surgery.core.agreement import Outputs
from surgery.core.arithmetic import GRID_BITS, exact_float64, exact_product, float_product
from surgery.core.method import Dense
from surgery.core.op import Tile
from surgery.core.rounding import round_once, ulp
from surgery.hosts.tree import adapted_layers
from surgery.layers.adapted import Adapted, Effective, Laying

_UNIT = 2.0 ** (1 - GRID_BITS)  # what the grid may add to a term, of its factors' largest: half a step for each


def as_merged(
    true: Outputs, model: nn.Module, outputs: Callable[[nn.Module], Outputs], dtypes: Mapping[str, torch.dtype]
) -> dict[str, Tensor]:
    """The outputs `true` of a float64 model with adapters, as an exact merge moves them.

    `outputs` runs a model, and `dtypes` are those of the merged one's parameters, by name. The model runs on its
    effective weights twice, as plain products make them, and as exact ones that are rounded.
    What is wrong with a formula is so with both, and moves nothing; and no weight is moved by more than grid and
    rounding explain, however they are computed.
    """
    plain, merged = (_run(model, outputs, laid) for laid in (lambda *_: _plainly, partial(_exactly_in, dtypes)))
    return {name: _moved(values, plain[name], merged[name]) for name, values in true.items()}


class HeldProduct:
    """The exact product, where it lies as near to the plain one as the grid explains; else what is nearest to it."""

    def __call__(self, B: Tensor, A: Tensor, tile: Tile, scaling: float, *, fine: bool = False) -> Tensor:
        exact, (rows, columns) = exact_product(B, A, tile, scaling, fine=fine), tile
        B, A = exact_float64(B), exact_float64(A)
        plain = float_product(B, A, tile, scaling)  # [..., out, in]
        largest = B.abs().amax(-1, keepdim=True)[..., rows, :] * A.abs().amax(-2, keepdim=True)[..., columns]
        most = abs(scaling) * A.shape[-2] * _UNIT * largest  # [..., out, in]
        return exact.clamp(plain - most, plain + most)

    def held(self, values: Tensor, role: str) -> Tensor:
        return exact_product.held(values, role)


held_product = HeldProduct()


def held_rounding(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Float64 values rounded to `dtype`, in float64: where that moves them by half an ulp at most."""
    half = ulp(values, dtype) / 2
    return round_once(values, dtype).to(torch.float64).clamp(values - half, values + half)


def _plainly(base: Dense, effective: Effective) -> Dense:
    return effective(base, float_product)


def _exactly_in(dtypes: Mapping[str, torch.dtype], path: str, layer: Adapted) -> Laying:
    """In the dtype that the layer's merged weight has; the model's widest where it is called otherwise."""
    name = path if layer.op.alone else f"{path}.{layer.op.roles.get('weight', 'weight')}"
    return partial(_exactly, dtypes[name] if name in dtypes else min(dtypes.values(), key=lambda d: torch.finfo(d).eps))


def _exactly(dtype: torch.dtype, base: Dense, effective: Effective) -> Dense:
    weight, bias = effective(base, held_product)
    return Dense(held_rounding(weight, dtype), None if bias is None else held_rounding(bias, dtype))


def _run(model: nn.Module, outputs: Callable[[nn.Module], Outputs], laid: Callable[[str, Adapted], Laying]) -> Outputs:
    """Its adapted layers run on their effective weights, made so."""
    layers = adapted_layers(model)
    try:
        for path, layer in layers.items():
            layer.laying = laid(path, layer)
        return outputs(model)
    finally:
        for layer in layers.values():
            layer.laying = None


def _moved(true: Tensor, plain: Tensor, merged: Tensor) -> Tensor:
    return torch.where(plain == merged, true, true + (merged - plain))  # equal infinities are not apart
