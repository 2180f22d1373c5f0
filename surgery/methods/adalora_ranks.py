"""AdaLoRA's ranks: how important each triplet is, and which are left of a budget. https://arxiv.org/abs/2303.10512

Each operation is PEFT's, in its order, so that the same gradients give the same masks.
"""

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from surgery.core.sharded import whole
from surgery.errors import ValueRangeError
from surgery.methods.adalora_config import AdaLoraConfig


class Smoothed(NamedTuple):
    """Of each element of a tensor, smoothed over steps: its sensitivity |w * grad|, and how uncertain that is."""

    sensitivity: Tensor
    uncertainty: Tensor

    def and_then(self, values: Tensor, grad: Tensor, config: AdaLoraConfig) -> "Smoothed":
        """With one more step in it."""
        now = (values * grad).abs()
        sensitivity = config.beta1 * self.sensitivity + (1 - config.beta1) * now
        uncertainty = config.beta2 * self.uncertainty + (1 - config.beta2) * (now - sensitivity).abs()
        return Smoothed(sensitivity, uncertainty)

    @property
    def score(self) -> Tensor:
        return self.sensitivity * self.uncertainty


Importance = Mapping[str, Smoothed]  # of one site, by role


def budget(config: AdaLoraConfig, step: int, sites: int) -> int:
    """How many triplets of all `sites` together are left at a step: it falls with the cube of the steps to go."""
    start, target = config.init_r * sites, config.target_r * sites
    to_go = 1 - (step - config.tinit) / (config.end - config.tinit)
    return int((start - target) * to_go**3 + target)


def masks(importance: Mapping[str, Importance], left: int) -> dict[str, list[bool]]:
    """By site, which triplets are left: those above the score that as many as are too many do not exceed."""
    scores = {name: _triplets(one) for name, one in importance.items()}
    together = torch.cat([values.to("cpu") for values in scores.values()])
    if not bool(torch.isfinite(together).all()):
        raise ValueRangeError(
            "AdaLoRA: the gradients have held NaN or infinity; finite ones are wanted; skip such steps, or lower the "
            "learning rate"
        )
    gone = len(together) - left
    chosen = (together > torch.kthvalue(together, gone)[0] if gone > 0 else torch.ones_like(together)).bool()
    parts = torch.split(chosen, [len(values) for values in scores.values()])
    return {name: part.tolist() for name, part in zip(scores, parts, strict=True)}


def _triplets(one: Importance) -> Tensor:
    """[r]: of each triplet, its singular value's score and the means of its vectors'."""
    A, E, B = (whole(one[role].score) for role in "AEB")  # summed as one process sums them
    return E.flatten() + (A.mean(1) + B.mean(0))
