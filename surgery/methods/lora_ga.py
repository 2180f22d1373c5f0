"""LoRA-GA: A and B start along the largest parts of the gradient, so that the first steps are as those of the weight.

Of U S V' = G, the mean gradient of examples, A takes r rows of V', and B r columns of U S, of the first 2 r.
https://arxiv.org/abs/2407.05000
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from surgery.core.arithmetic import all_finite
from surgery.core.method import Dense, Params
from surgery.core.site import Site
from surgery.core.starter import Observer
from surgery.errors import ValueRangeError, printable
from surgery.methods.field_values import check_choice, check_whole
from surgery.methods.inits import FromBase
from surgery.methods.mean import Mean

_ROUNDS = 4  # of the randomized SVD, as in PEFT


@dataclass(frozen=True)
class LoraGaSettings:
    """PEFT's LoraGAConfig."""

    direction: str = "ArB2r"  # which of the 2 r parts are for A, and which for B
    scale: str = "stable"
    stable_gamma: int = 16

    def __post_init__(self) -> None:
        check_choice("direction", self.direction, ("ArBr", "A2rBr", "ArB2r", "random"))
        check_choice("scale", self.scale, ("stable", "weight_svd", "gd_scale", "unit"))
        check_whole("stable_gamma", self.stable_gamma, 1, 1 << 31)


class LoraGa(Observer):
    """The gradient of a weight, over all batches."""

    start = "lora_ga"
    sees = "gradients"

    def __init__(self, site: Site, settings: LoraGaSettings) -> None:
        self.name, self.shape, self.settings = site.name, site.shape, settings
        self.mean = Mean()  # [out, in]

    @property
    def nbytes(self) -> int:
        return 4 * self.shape[0] * self.shape[1]

    def see(self, values: Tensor) -> None:
        if not all_finite(values):
            raise ValueRangeError(
                f"{printable(self.name)}: its gradient holds NaN or infinity; finite numbers are wanted; give other "
                "examples, or another loss"
            )
        self.mean.add(values.float())

    def seen(self) -> bool:
        return self.mean.count > 0

    def begin(self, site: Site, method: FromBase, base: Callable[[], Dense]) -> Params:
        r, W = method.rank, method.checked_weight(site, base, parts=2)
        U, S, V = _leading(self.mean.value, r)
        for_A, for_B = _parts(self.settings.direction, r)
        A, B = V.T[for_A], U[:, for_B] * S[for_B]  # [r, in], [out, r]
        if self.settings.scale == "gd_scale":
            scaling = method.positive_scaling(site)
            return method.begun(site, B / scaling, A / scaling)
        return method.begun(site, B * self._factor(W, r, float(S[for_B][0])), A)

    def _factor(self, W: Tensor, r: int, largest: float) -> float:
        if self.settings.scale == "stable":
            return float(len(W) ** 0.25 / self.settings.stable_gamma**0.5)
        if self.settings.scale == "unit" or not largest:
            return 1.0
        return float(_leading(W, r)[1][0]) / largest


def _leading(matrix: Tensor, r: int) -> tuple[Tensor, Tensor, Tensor]:
    """Its largest singular parts, 2 r of them well."""
    U, S, V = torch.svd_lowrank(matrix, q=min(4 * r, *matrix.shape), niter=_ROUNDS)
    return U, S, V


def _parts(direction: str, r: int) -> tuple[Tensor, Tensor]:
    """Which of the first 2 r parts A takes, and which B."""
    if direction == "random":
        drawn = torch.randperm(2 * r)[:r]
        return drawn, drawn
    both = torch.arange(2 * r)
    if direction == "ArBr":
        return both[1::2], both[0::2]
    return (both[:r], both[r:]) if direction == "ArB2r" else (both[r:], both[:r])
