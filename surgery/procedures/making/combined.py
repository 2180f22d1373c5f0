"""Combined: the factors of several adapters at one site as one pair, of a stack expert by expert; and its error."""

import math
from collections.abc import Collection, Sequence
from functools import reduce

import torch

from surgery.adapters.peft import check_finite
from surgery.core.adapter import Weighted, shape_of
from surgery.errors import ShapeError, ValueRangeError, printable
from surgery.methods.lora import Lora
from surgery.methods.stacks import by_expert, stacked
from surgery.ops.experts import Experts
from surgery.procedures.making.combinations import COMBINATIONS, Factors, Recipe, norm
from surgery.procedures.making.fidelity import Fidelity
from surgery.procedures.places.parameters import MATRICES


def combined(
    name: str, given: Sequence[Weighted], recipe: Recipe, draws: torch.Generator, parameters: Collection[str]
) -> tuple[Factors, Fidelity]:
    """One site, as it is written; and its error, against what the files say in float64.

    Those of `parameters` may be stacks. InputError for factors that are not of one weight, or give no finite outcome.
    """
    there = [one for one in given if name in one.adapter.sites]
    if name in parameters:
        return _of_experts(name, there, recipe, draws)
    found = [_factors(name, one) for one in there]
    inputs = _inputs(name, there)
    made, told = _made(name, found, recipe, draws, _dtype(name, there))
    points = (1 for _ in inputs[1:])
    return Factors(made.A.view(told.r, *inputs), made.B.view(-1, told.r, *points)), told


def _of_experts(
    name: str, there: Sequence[Weighted], recipe: Recipe, draws: torch.Generator
) -> tuple[Factors, Fidelity]:
    found = [_experts(name, one) for one in there]
    _inputs(name, there)
    counts = sorted({len(one) for one in found})
    if len(counts) > 1:
        raise ShapeError(f"{printable(name)}: the adapters are made for {counts} experts; one base is wanted")
    dtype = _dtype(name, there)
    each = [_made(name, of_one, recipe, draws, dtype) for of_one in zip(*found, strict=True)]
    told = [one for _, one in each]
    held = stacked([{"A": made.A, "B": made.B} for made, _ in each], Experts(stack=len(each)))
    norms = (math.hypot(*(getattr(one, norm) for one in told)) for norm in ("exact_norm", "error_norm"))
    return Factors(held["A"], held["B"]), Fidelity(told[0].r, *norms)


def _made(
    name: str, found: Sequence[Factors], recipe: Recipe, draws: torch.Generator, dtype: torch.dtype
) -> tuple[Factors, Fidelity]:
    """One matrix."""
    _check_ranks(name, found, recipe)
    whole = norm(found)
    if not math.isfinite(whole):
        raise ValueRangeError(f"{printable(name)}: the sum overflows float64; take smaller weights")
    made = COMBINATIONS[recipe.method](found, recipe, draws)
    written = Factors(made.A.to(dtype).contiguous(), made.B.to(dtype).contiguous())
    if not (written.A.isfinite().all() and written.B.isfinite().all()):
        raise ValueRangeError(
            f"{printable(name)}: the outcome overflows {dtype}; finite numbers are wanted; take smaller weights"
        )
    error = norm([*found, Factors(written.A.double(), written.B.double(), -1.0)])
    return written, Fidelity(len(written.A), whole, error)


def _dtype(name: str, there: Sequence[Weighted]) -> torch.dtype:
    """That of the widest factors, at least float32."""
    kinds = [factor.dtype for one in there for factor in one.adapter.sites[name].values()]
    return reduce(torch.promote_types, kinds, torch.float32)


def _experts(name: str, one: Weighted) -> list[Factors]:
    """Those of a stack; of a parameter that is one matrix, one."""
    method, p = one.adapter.config.method(name), dict(one.adapter.sites[name])
    assert isinstance(method, Lora)
    A, B = p["A"].shape, p["B"].shape
    if len(A) != 2 or len(B) != 2 or A[0] != B[1] or not A[0] or A[0] % method.r:
        raise ShapeError(
            f"{printable(one.adapter.where)}: {printable(name)}: A is {list(A)}, B {list(B)}; [experts * {method.r}, "
            f"in] and [out, {method.r} * experts] are wanted by its config; save it again"
        )
    stack = A[0] // method.r
    _check_stack(name, one, stack)
    check_finite(name, p, one.adapter.where)
    held = by_expert(p, Experts(stack=stack))
    scale = one.weight * method.scaling
    return [Factors(A.double(), B.double(), scale) for A, B in zip(held["A"], held["B"], strict=True)]


def _check_stack(name: str, one: Weighted, found: int) -> None:
    """ShapeError where it is known that the parameter has not so many matrices: a damaged rank looks like a stack."""
    base, _ = one.adapter.trained_on.get(name, (None, ""))
    wanted: int | None = 1 if name.rpartition(".")[2] in MATRICES else None
    if base is not None and isinstance(base.dtype, torch.dtype) and base.dtype.is_floating_point:  # no codes
        wanted = base.shape[0] if len(base.shape) > 2 else 1
    if wanted not in (None, found):
        told = "one matrix" if wanted == 1 else f"a stack of {wanted}"
        raise ShapeError(
            f"{printable(one.adapter.where)}: {printable(name)}: the factors are those of {found} matrices by its "
            f"config's rank, and the parameter is {told}; the rank that the factors have is wanted; save it again"
        )


def _factors(name: str, one: Weighted) -> Factors:
    method, p = one.adapter.config.method(name), dict(one.adapter.sites[name])
    assert isinstance(method, Lora)
    A, B = p["A"].shape, p["B"].shape
    if not 2 <= len(A) == len(B) or len(A) > 5 or A[0] != method.r or B[1] != method.r or math.prod(B[2:]) != 1:
        raise ShapeError(
            f"{printable(one.adapter.where)}: {printable(name)}: A is {list(A)}, B {list(B)}; [{method.r}, in] and "
            f"[out, {method.r}] are wanted by its config, of a convolution [{method.r}, channels, *kernel] and [out, "
            f"{method.r}, 1, ...] in one group; save it again, or merge such adapters one over the other"
        )
    check_finite(name, p, one.adapter.where)
    return Factors(p["A"].double().flatten(1), p["B"].double().flatten(1), one.weight * method.scaling)


def _inputs(name: str, given: Sequence[Weighted]) -> tuple[int, ...]:
    """Those that A takes: how many, or channels and kernel of a convolution. ShapeError unless they are one base's."""
    held = [one.adapter.sites[name] for one in given]
    shapes = sorted({(shape_of(p, "B")[0], *shape_of(p, "A")[1:]) for p in held})
    if len(shapes) > 1:
        raise ShapeError(f"{printable(name)}: the adapters are made for weights of {shapes}; one base is wanted")
    return shapes[0][1:]


def _check_ranks(name: str, found: Sequence[Factors], recipe: Recipe) -> None:
    ranks = sorted({len(one.A) for one in found})
    if len(ranks) > 1 and recipe.method not in ("cat", "svd"):
        raise ShapeError(f"{printable(name)}: the ranks are {ranks}; {recipe.method} wants equal ones; take cat or svd")
