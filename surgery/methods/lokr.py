"""LoKr: W + scaling * w1 (x) w2, a Kronecker product, either factor of which may be a product itself.

https://arxiv.org/abs/2309.14859
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import isqrt, prod

import torch
from torch import Tensor

from surgery.core.arithmetic import exact_product, float_product
from surgery.core.method import Additive, Dense, Params, Product, Run
from surgery.core.op import Op, Tile, in_dtype_of, onto
from surgery.core.site import Site
from surgery.core.spec import Spec
from surgery.methods.kaiming import kaiming
from surgery.methods.lycoris import (
    NONE,
    Dropouts,
    as_matrices,
    check_op,
    factor,
    factor_spread,
    is_tucker,
)
from surgery.methods.spreads import unit_of

Init = bool | str


@dataclass(frozen=True)
class LoKr(Additive):
    """The delta of output (i, b) and input (j, d) is w1[i, j] w2[b, d]: w1 is [l, m], w2 is [k, n, *kernel].

    A whole w2 of a Conv1d is the first of the two, (b, i) and (d, j): so PEFT's product of a matrix and a stack comes
    out, and so its adapters are trained.
    """

    r: int
    effective: bool = False  # is a kernel in Tucker's form?
    both: bool = False  # may w1 be a product too?
    divisor: int = -1  # how large l and m are to be; -1: as near as can be to k and n
    dropouts: Dropouts = NONE
    start: Init = True

    name = "LoKr"

    def tensors(self, site: Site) -> Mapping[str, Spec]:
        check_op(site, self.name)
        (out_features, in_features), kernel, r = site.shape, site.acting.kernel, self.r
        l, k = factorized(out_features, self.divisor)  # noqa: E741
        m, n = factorized(in_features // max(1, prod(kernel)), self.divisor)
        found: dict[str, tuple[int, ...]] = {"w1": (l, m)}
        if self.both and 2 * r < max(l, m):
            found = {"w1_a": (l, r), "w1_b": (r, m)}
        if 2 * r >= max(k, n):
            found |= {"w2": (k, n, *kernel)}
        elif self.effective and is_tucker(kernel):
            found |= {"w2_a": (r, k), "w2_b": (r, n), "t2": (r, r, *kernel, *(1 for _ in range(2 - len(kernel))))}
        else:
            found |= {"w2_a": (k, r), "w2_b": (r, n * prod(kernel))}
        return {role: Spec(f"lokr_{role}", shape) for role, shape in found.items()}

    def init(self, site: Site, base: Callable[[], Dense]) -> Params:  # noqa: ARG002  # for others
        fresh = {role: kaiming(spec.shape) for role, spec in self.tensors(site).items()}
        zeros = {True: ("w1", "w1_a"), "lycoris": ("w2", "w2_b")}.get(self.start, ())
        return {role: torch.zeros_like(values) if role in zeros else values for role, values in fresh.items()}

    def matrices(self, p: Params, site: Site) -> Params:
        found = dict(as_matrices(p))
        if _is_second_first(p, site.acting):
            found["w2"] = p["w2"]  # [k, n, kernel]: by its axes it is told
        return found

    def delta(self, p: Params, tile: Tile, product: Product) -> Tensor:
        rows, columns = tile
        first, second = _rows_of(p, rows)
        values = _outer(factor(p, "1", first, product), factor(p, "2", second, product))  # [out, in]
        return (values * self.scaling)[:, columns]

    def spread(self, p: Params, tile: Tile) -> Tensor:
        # What each of the two may be off by, at what the other is; then their product, the scaling, as float32 holds
        # it, and the product with it are rounded, and what these are off by once more.
        rows, columns = tile
        places = dict(zip("12", _rows_of(p, rows), strict=True))
        first, second = (factor(p, one, at, exact_product).abs() for one, at in places.items())
        off, other = (factor_spread(p, one, at) for one, at in places.items())
        off, other = off.expand_as(first), other.expand_as(second)
        apart = _outer(off, second + other) + _outer(first, other) + 4 * unit_of(*p.values()) * _outer(first, second)
        return (abs(self.scaling) * apart)[:, columns]

    def branch(self, x: Tensor, run: Run, op: Op, p: Params, training: bool) -> Tensor:
        below = run(x)
        x = in_dtype_of(next(iter(p.values())), x)
        moved = _moved(x, op, p) if op.groups == 1 else op.apply(x, _dense(p, op))
        kept = self.dropouts.kept(moved.shape[-1 - len(op.kernel)], moved) if training else None
        return onto(below, moved if kept is None else moved * op.beside(kept), self.scaling)


def factorized(size: int, divisor: int) -> tuple[int, int]:
    """Two numbers whose product is `size`: the first is `divisor`, or the largest below it that is not above the other.

    For -1 nothing else bounds it.
    """
    if divisor > 0 and size % divisor == 0:
        return divisor, size // divisor
    most = isqrt(size) if divisor == -1 else min(divisor, isqrt(size))
    first = next((one for one in range(most, 0, -1) if size % one == 0), 1)
    return first, size // first


def _is_second_first(p: Params, op: Op) -> bool:
    return "w2" in p and len(op.kernel) == 1


def _rows_of(p: Params, rows: slice) -> tuple[Tensor, Tensor]:
    """The rows of w1 and of w2, as matrices, by which these rows of the delta are made."""
    l, k = len(p["w1"] if "w1" in p else p["w1_a"]), len(p["w2"] if "w2" in p else p["w2_a"])  # noqa: E741
    at = torch.arange(l * k, device=next(iter(p.values())).device)[rows]
    if "w2" in p and p["w2"].dim() > 2:
        return at % l, at // l
    return at // k, at % k


def _outer(first: Tensor, second: Tensor) -> Tensor:
    """Row by row [rows, m] and [rows, n], or the second one first and [rows, n, places], as [rows, in]."""
    if second.dim() > 2:
        return (second.unsqueeze(2) * first[:, None, :, None]).flatten(1)
    return (first.unsqueeze(2) * second.unsqueeze(1)).flatten(1)


def _dense(p: Params, op: Op) -> Tensor:
    """The delta before its scaling, [out, in], in the factors' dtype."""
    held = dict(as_matrices(p)) | ({"w2": p["w2"]} if _is_second_first(p, op) else {})
    first, second = _rows_of(held, slice(None))
    return _outer(factor(held, "1", first, float_product), factor(held, "2", second, float_product))


def _moved(x: Tensor, op: Op, p: Params) -> Tensor:
    """What the delta makes of an input, without the delta: w2 of each of m parts, then w1 of the outcomes."""
    axes, swaps = len(op.kernel), _is_second_first(p, op)
    above, channels = -2 - axes, -1 - axes
    m = (p["w1"] if "w1" in p else p["w1_b"]).shape[1]
    parts = (
        torch.unflatten(x, channels, (-1, m)).transpose(above, channels)
        if swaps
        else torch.unflatten(x, channels, (m, -1))
    )
    h = _second(parts.reshape(-1, *parts.shape[channels:]), op, p)  # [batch * m, k, *places]
    inner = h.shape[channels:]
    h = _first(h.reshape(*parts.shape[:channels], inner.numel()), p)  # [*batch, l, k * places]
    h = torch.unflatten(h, -1, inner)
    return (h.transpose(above, channels) if swaps else h).flatten(above, channels)  # [*batch, out, *places]


def _second(x: Tensor, op: Op, p: Params) -> Tensor:
    """w2 as the op acts: [batch, n, *places] -> [batch, k, *places]"""
    if "w2" in p:
        return op.apply(x, p["w2"].flatten(1))
    if "t2" in p:
        return op.mix(op.apply(op.mix(x, p["w2_b"]), p["t2"].flatten(1)), p["w2_a"].T)
    return op.mix(op.apply(x, p["w2_b"]), p["w2_a"])


def _first(h: Tensor, p: Params) -> Tensor:
    """[*batch, m, k] -> [*batch, l, k]; as one product of matrices, whether torch would make it many or not."""
    *batch, m, k = h.shape
    rows = h.mT.reshape(-1, m)
    rows = rows @ p["w1"].T if "w1" in p else rows @ p["w1_b"].T @ p["w1_a"].T  # [batch * k, l]
    return rows.view(*batch, k, rows.shape[1]).mT
