"""Factored: what a weight has over its base, as low-rank factors that are laid down for an adapter's file."""

import math
from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from surgery.adapters.spill import Spill
from surgery.core.arithmetic import all_finite
from surgery.core.method import Params
from surgery.core.site import Site
from surgery.core.turned import tied
from surgery.errors import ValueRangeError, printable
from surgery.hosts.checkpoint import Checkpoint
from surgery.methods.lora import Lora
from surgery.methods.stacks import stacked
from surgery.procedures.making.combinations import Factors
from surgery.procedures.making.expert_stacks import Stack
from surgery.procedures.making.fidelity import Fidelity
from surgery.procedures.making.low_rank import Truncation, low_rank, residual_norm
from surgery.procedures.making.tuning import whole


class Pair(NamedTuple):
    """Two checkpoints of the same names and shapes."""

    base: Checkpoint
    tuned: Checkpoint


def factored(pair: Pair, sites: Sequence[Site], truncation: Truncation, spill: Spill) -> Fidelity:
    """The first of the sites, whose float32 factors those have that are tied to it; and their error."""
    name = sites[0].weight.name
    before, after = (whole(one, one.at[name][1].info) for one in pair)
    delta = sites[0].acting.matrix(_delta(pair, name, before, after))  # [out, in]
    made = low_rank(delta, truncation)
    r, factors = len(made.A), {"A": made.A, "B": made.B}
    for site in sites:
        held = factors if site is sites[0] else tied(site.acting, factors)
        for role, spec in Lora(scaling=1.0, r=r).tensors(site).items():
            spill.add(f"{site.name}.{spec.spelling}", held[role].reshape(spec.shape))
    return Fidelity(r, float(delta.norm()), residual_norm(delta, made))


def factored_stack(pair: Pair, stack: Stack, spelled: str, truncation: Truncation, spill: Spill) -> Fidelity:
    """A stack expert by expert, named `spelled`; of the rank of the one that needs most."""
    found = [_expert(pair, stack, expert, truncation) for expert in range(len(stack.experts))]
    held = stacked([factors for factors, _ in found], stack.site.acting)
    r = len(held["A"]) // len(found)
    for role, spec in Lora(scaling=1.0, r=r).tensors(stack.site).items():
        spill.add(f"{spelled}.{spec.spelling}", held[role])
    each = [one for _, one in found]
    return Fidelity(r, math.hypot(*(one.exact_norm for one in each)), math.hypot(*(one.error_norm for one in each)))


def _expert(pair: Pair, stack: Stack, expert: int, truncation: Truncation) -> tuple[Params, Fidelity]:
    """One that did not change has zeros, of rank 1."""
    name = stack.experts[expert][0].info.name
    before, after = (stack.matrix(one, expert) for one in pair)
    delta = _delta(pair, name, before, after)  # [rows, columns]
    rows, columns = delta.shape
    zeros = Factors(delta.new_zeros(1, columns).float(), delta.new_zeros(rows, 1).float())
    made = low_rank(delta, truncation) if delta.any() else zeros
    return {"A": made.A, "B": made.B}, Fidelity(len(made.A), float(delta.norm()), residual_norm(delta, made))


def _delta(pair: Pair, name: str, before: Tensor, after: Tensor) -> Tensor:
    """In float64. ValueRangeError where it is not finite."""
    for where, values in zip(pair, (before, after), strict=True):
        if not all_finite(values):
            raise ValueRangeError(
                f"{printable(where.path)}: {printable(name)} holds NaN or infinity; finite numbers are wanted"
            )
    return after.double().sub_(before)
