"""Agreement: whether two models give the same outputs, as far as the noise of their dtype lets one tell.

true: the one model's outputs, run in float64. found: the other's. floor: how far a run in the model's own dtype
lies from its run in float64. base: the outputs without the adapter, from which its effect is told.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from surgery.core.distance import NOWHERE, Distance, distance, half_ulp, within

Outputs = Mapping[str, Tensor]

# How many floors an output may be off. Two roundings are not in the floor together: that of the weights, once
# merged, and that of the run in its dtype; hence 2. And other kernels add in another order: a sum of n terms in
# one chain errs sqrt(16) times as far as in 16 partial sums, as vector units take it; hence 4.
FACTOR = 8
# The effect of an adapter must be so many times the error. Applied with half its scaling it is off by half its
# effect, with twice by all of it, left out by all of it; a quarter is none of these.
MARGIN = 4
# The part of an adapter's effect that exact arithmetic leaves open in any dtype: A and B lie on grids whose half
# step is at most 2^-22 of a row's or column's largest; a sum of r such errors is about 2^-21 of the delta. A model may
# make more of it: procedures/checking/exactly.py tells what.
GRAIN = 2.0**-20


class Agreement(NamedTuple):
    """How far one output lies from the true one, and why that is too far, if it is."""

    name: str
    shape: tuple[int, ...]  # of the true one
    rows: int  # that were compared, along the axes of the mask, or the first one
    found: Distance
    floor: Distance
    effect: float | None = None  # max|true - base| / max|true|
    why: str = ""

    @property
    def ok(self) -> bool:
        return not self.why

    def to_json(self) -> dict[str, Any]:
        """Its fields; infinities are null, for JSON has none."""
        told = {"found": _finite(self.found), "floor": _finite(self.floor), "effect": self.effect}
        return {"ok": self.ok, "shape": list(self.shape), "rows": self.rows, **told, "why": self.why}


@dataclass(frozen=True)
class Agreements:
    """All outputs of two models, and those that could not be compared."""

    outputs: Sequence[Agreement]
    left_out: Sequence[str] = ()  # such as a cache, by name and type

    @property
    def ok(self) -> bool:
        """Each output agrees, there is one, and the adapter, if one is known of, changes some."""
        return not self.why

    @property
    def why(self) -> str:
        """Why they do not agree, of the first that does not."""
        wrong = next((one for one in self.outputs if one.why), None)
        if wrong is not None:
            return f"{wrong.name}: {wrong.why}"
        if not self.outputs:
            return "there is no output to compare"
        return "the adapter changes no output at all" if self._changes_nothing() else ""

    @property
    def stands_out(self) -> bool:
        """Does the adapter, if one is known of, change some output, and each so much that the error does not matter?"""
        return not self._changes_nothing() and not any(_too_faint(one.found, one.effect) for one in self.outputs)

    def settled(self, again: "Agreements") -> "Agreements":
        """This one, where `again` is by what an exact merge makes of the truth: what rounding drowns is no merge."""
        return again if self.stands_out or not again.ok else self

    def _changes_nothing(self) -> bool:
        effects = [one.effect for one in self.outputs if one.effect is not None]
        return bool(effects) and max(effects) == 0

    def table(self) -> str:
        """The figures, in columns."""
        lines = [COLUMNS, *(figures(one) for one in self.outputs)]
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        rows = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) for line in lines]
        return "\n".join([*(row.rstrip() for row in rows), *(f"not compared: {name}" for name in self.left_out)])

    def to_json(self) -> dict[str, Any]:
        return {
            "ok": self.ok,
            "why": self.why,
            "outputs": {one.name: one.to_json() for one in self.outputs},
            "left_out": list(self.left_out),
        }


def floors(own: Outputs, exact: Outputs, rows: Tensor | None = None) -> dict[str, Distance]:
    """The noise floor of each output of a model: of its run in its own dtype, against its run in float64."""
    found = {}
    for name in own.keys() & exact.keys():
        true, run = picked(exact[name], rows), picked(own[name], rows)
        logits = is_logits(name, true)
        apart = distance(true, run, logits) if true.shape == run.shape else NOWHERE
        found[name] = apart.at_least(half_ulp(run, true, logits))
    return found


def compare(  # noqa: PLR0913, PLR0917  # the runs, and how strictly they are judged
    true: Outputs,
    found: Outputs,
    floor: Mapping[str, Distance],
    base: Outputs | None = None,
    rows: Tensor | None = None,
    factor: float = FACTOR,
) -> Agreements:
    """Judge each output of `found` by `true`: its error in floors, and, with `base`, in the adapter's effect.

    `factor` floors are allowed; with `base`, a floor is no lower than GRAIN of the effect.

    `rows` is a mask [batch, ...] of what counts, for the outputs that begin with its axes: what a model makes of
    padding is undefined.
    """
    told = [_judged(name, true[name], found.get(name), floor.get(name), base, rows, factor) for name in true]
    return Agreements([*told, *(_alone(name, found[name], "only the other has it") for name in found.keys() - true)])


def is_logits(name: str, values: Tensor) -> bool:
    """Is it an output over classes? Its name says so."""
    return "logits" in name.rpartition(".")[2] and values.dim() > 0 and values.shape[-1] > 1


def picked(values: Tensor, rows: Tensor | None) -> Tensor:
    """The rows that count; all of an output that does not begin with the mask's axes."""
    if rows is None or values.shape[: rows.dim()] != rows.shape:
        return values
    return values[rows.to(values.device, torch.bool)]


def _judged(  # noqa: PLR0913, PLR0917  # the runs that bear on one output
    name: str,
    true: Tensor,
    found: Tensor | None,
    floor: Distance | None,
    base: Outputs | None,
    rows: Tensor | None,
    factor: float,
) -> Agreement:
    if found is None:
        return _alone(name, true, "the other has it not")
    if found.shape != true.shape:
        return _alone(name, true, f"the other's is {list(found.shape)}")
    if floor is None or not floor.error * factor < 1:  # an output of zeros has an error of 1
        told = "none" if floor is None else f"{floor.error:.2g}"
        return _alone(name, true, f"its noise floor is {told}, from which nothing can be told; another dtype is wanted")
    a, logits = picked(true, rows), is_logits(name, true)
    if a.numel() == 0:
        return _alone(name, true, "no row of it is left to compare")
    apart = distance(a, picked(found, rows), logits)
    effect = None
    if base is not None:
        effect = _effect(true, base.get(name), rows)
        if effect == math.inf:
            return _alone(name, true, "the base gives no numbers of its shape, from which no effect can be told")
        floor = floor.at_least(within(GRAIN * effect, a, logits))
    why = _too_far(apart, floor, factor) or _too_faint(apart, effect)
    return Agreement(name, tuple(true.shape), a.shape[0] if a.dim() else 1, apart, floor, effect, why)


def _effect(true: Tensor, base: Tensor | None, rows: Tensor | None) -> float:
    """Infinite where it cannot be told."""
    if base is None or base.shape != true.shape:
        return math.inf
    return distance(picked(true, rows), picked(base, rows)).error


def _alone(name: str, values: Tensor, why: str) -> Agreement:
    return Agreement(name, tuple(values.shape), 0, NOWHERE, NOWHERE, None, why)


def _too_far(found: Distance, floor: Distance, factor: float) -> str:
    """What exceeds so many floors, or nothing. Within the error that is allowed, only logits so near swap places."""
    allowed = floor.scaled(factor)
    for what in ("error", "angle", "kl_mean", "kl_max"):
        here, most = getattr(found, what), getattr(allowed, what)
        if not here <= most:  # true for NaN
            return f"{_TITLES[what]} is {here:.2g}, {most:.2g} is allowed ({factor:g} floors)"
    return ""


def _too_faint(found: Distance, effect: float | None) -> str:
    """Where the adapter's effect does not stand out from the error. One that it does not reach is judged by noise."""
    if effect is None or effect == 0 or effect >= MARGIN * found.error:
        return ""
    return f"the error is {found.error:.2g} and the adapter's whole effect {effect:.2g}; {MARGIN} times it is wanted"


_TITLES = {"error": "the error", "angle": "1 - cosine", "kl_mean": "the mean KL", "kl_max": "the largest KL"}
COLUMNS = ("output", "agrees", "error", "floor", "1 - cosine", "KL mean", "KL max", "top-1", "effect", "why")


def figures(one: Agreement) -> tuple[str, ...]:
    """The cells of a table under COLUMNS."""
    found, logits = one.found, one.found.kl_max or one.floor.kl_max
    numbers = [found.error, one.floor.error, found.angle]
    of_logits = [f"{found.kl_mean:.2g}", f"{found.kl_max:.2g}", f"{found.top1:.2%}"] if logits else ["", "", ""]
    effect = "" if one.effect is None else f"{one.effect:.2g}"
    return (one.name, "yes" if one.ok else "no", *(f"{n:.2g}" for n in numbers), *of_logits, effect, one.why)


def in_words(one: Agreement) -> str:
    """The figures but for the error, and what is wrong, as one line."""
    cells = dict(zip(COLUMNS, figures(one), strict=True))
    told = [f"{name} {cells[name]}" for name in COLUMNS[3:-1] if cells[name]]
    return "; ".join([*told, one.why] if one.why else told)


def _finite(value: Distance) -> dict[str, float | None]:
    return {name: number if math.isfinite(number) else None for name, number in value._asdict().items()}
