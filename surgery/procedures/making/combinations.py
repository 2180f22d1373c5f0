"""Combinations of LoRA factors at one site, as PEFT's add_weighted_adapter defines them; and how far each is off.

`cat` and `svd` act on the sum of the products B A; the others on the A of all and the B of all apart, so that
cross terms come in.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from surgery.core.option_checks import check_whole
from surgery.errors import UsageError, quoted


class Factors(NamedTuple):
    """scale * B A: A is [r, in], B is [out, r]."""

    A: Tensor
    B: Tensor
    scale: float = 1.0


_KINDS: Mapping[str, tuple[type, ...]] = {
    "method": (str,),
    "density": (int, float),
    "majority_sign_method": (str,),
}


@dataclass(frozen=True)
class Recipe:
    """How factors are combined. UsageError for a setting that the method does not have, or that cannot be."""

    method: str = "cat"
    density: float | None = None
    majority_sign_method: str | None = None
    rank: int | None = None
    seed: int | None = None

    def __post_init__(self) -> None:
        for name, kinds in _KINDS.items():
            value = getattr(self, name)
            if value is not None and (isinstance(value, bool) or not isinstance(value, kinds)):
                raise UsageError(f"`{name}` is {quoted(value)}; {kinds[-1].__name__} is wanted")
        if self.method not in COMBINATIONS:
            known = ", ".join(COMBINATIONS)
            raise UsageError(f"`method` is {quoted(self.method)}, which is not known; one of {known} is wanted")
        for name in ("density", "majority_sign_method", "rank", "seed"):
            if getattr(self, name) is not None and self.method not in _SETTINGS[name]:
                having = ", ".join(_SETTINGS[name])
                raise UsageError(f"`{name}`: the method {self.method} has none; leave it out, or take {having}")
        if self.method in _SETTINGS["density"] and not (self.density is not None and 0 < self.density <= 1):
            found = "none is given" if self.density is None else f"it is {self.density}"
            raise UsageError(f"`density`: {found}; {self.method} wants one above 0 and at most 1, such as 0.5")
        if self.majority_sign_method not in (None, "total", "frequency"):
            found = quoted(self.majority_sign_method)
            raise UsageError(f"`majority_sign_method` is {found}; 'total' or 'frequency' is wanted")
        if self.seed is not None:
            check_whole("`seed`", self.seed, 0, (1 << 63) - 1)
        if self.rank is not None:
            check_whole("`rank`", self.rank, 1)

    def draws(self) -> torch.Generator:
        """The random numbers of a whole combination."""
        return torch.Generator().manual_seed(self.seed or 0)


def cat(given: Sequence[Factors], _: Recipe, __: torch.Generator) -> Factors:
    """The very sum: ranks are added, and each scale goes into its A."""
    return Factors(torch.cat([one.A * one.scale for one in given]), torch.cat([one.B for one in given], 1))


def svd(given: Sequence[Factors], recipe: Recipe, draws: torch.Generator) -> Factors:
    """What is nearest to the sum in its rank, by default the largest of those given. No [out, in] is made."""
    A, B, _ = cat(given, recipe, draws)
    rank = recipe.rank or max(len(one.A) for one in given)
    left, right = torch.linalg.qr(B), torch.linalg.qr(A.T)
    U, S, Vh = torch.linalg.svd(left.R @ right.R.T, full_matrices=False)
    if not len(S):  # of a weight without elements, whose factors have a rank all the same
        return Factors(A[:1] * 0, B[:, :1] * 0)
    return Factors(Vh[:rank] @ right.Q.T, left.Q @ (U[:, :rank] * S[:rank]))


def apart(given: Sequence[Factors], recipe: Recipe, draws: torch.Generator) -> Factors:
    """The A of all and the B of all, each combined with the square root of the scales; A bears the signs."""
    roots = [math.sqrt(abs(one.scale)) for one in given]
    signed = [math.copysign(root, one.scale) for root, one in zip(roots, given, strict=True)]
    A = _mixed([one.A for one in given], signed, recipe, draws)
    return Factors(A, _mixed([one.B for one in given], roots, recipe, draws))


Combine = Callable[[Sequence[Factors], Recipe, torch.Generator], Factors]

COMBINATIONS: Mapping[str, Combine] = {
    "cat": cat,
    "svd": svd,
    "linear": apart,
    "ties": apart,
    "dare_linear": apart,
    "dare_ties": apart,
    "magnitude_prune": apart,
}

_SETTINGS: Mapping[str, Sequence[str]] = {
    "density": ("ties", "dare_linear", "dare_ties", "magnitude_prune"),
    "majority_sign_method": ("ties", "dare_ties"),
    "rank": ("svd",),
    "seed": ("dare_linear", "dare_ties"),
}


def norm(given: Sequence[Factors]) -> float:
    """||sum of scale B A||, Frobenius, through the triangles of the stacked factors: no [out, in] is made."""
    A = torch.cat([one.A * one.scale for one in given])
    B = torch.cat([one.B for one in given], 1)
    left, right = torch.linalg.qr(B, mode="r").R, torch.linalg.qr(A.T, mode="r").R
    return float((left @ right.T).norm())


def _mixed(tensors: Sequence[Tensor], weights: Sequence[float], recipe: Recipe, draws: torch.Generator) -> Tensor:
    stacked = torch.stack([_pruned(one, recipe, draws) for one in tensors])
    weighted = stacked * torch.tensor(weights, dtype=stacked.dtype)[:, None, None]
    if recipe.method not in _SETTINGS["majority_sign_method"]:
        return weighted.sum(0)
    votes = stacked.sign() if recipe.majority_sign_method == "frequency" else stacked
    agreed = stacked.sign() == torch.where(votes.sum(0) >= 0, 1, -1)
    return (weighted * agreed).sum(0) / agreed.sum(0).clamp(min=1)


def _pruned(values: Tensor, recipe: Recipe, draws: torch.Generator) -> Tensor:
    """`density` of the values, the largest or random ones; the random ones are scaled up to the same expectation."""
    if recipe.density is None or recipe.density == 1:
        return values
    if recipe.method in _SETTINGS["seed"]:
        chances = torch.full(values.shape, recipe.density, dtype=torch.float32)
        return values * torch.bernoulli(chances, generator=draws) / recipe.density
    flat = values.flatten()
    kept = flat.abs().topk(int(recipe.density * flat.numel())).indices
    return torch.zeros_like(flat).index_copy(0, kept, flat[kept]).reshape(values.shape)
