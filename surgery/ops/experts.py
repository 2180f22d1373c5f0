"""Experts: a parameter by itself, whose module reads it; of three axes, a matrix for each expert.

Stored as [out, in], or [stack, out, in], or where the module says `is_transposed` [stack, in, out]. Its matrix is
[stack * rows, columns], one expert below another, as they lie in memory.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Self

from torch import Tensor

from surgery.core.op import Op
from surgery.ops.linear import Linear


@dataclass(frozen=True)
class Experts(Linear):
    """A parameter that may be a stack. `roles` tells its name in the module."""

    name = "experts"
    alone = True

    stack: int = 0
    roles: Mapping[str, str] = field(default_factory=dict, compare=False)

    def matrix(self, stored: Tensor) -> Tensor:
        return stored.flatten(0, -2)  # [stack, rows, columns] -> [stack * rows, columns]

    def shape(self, stored: tuple[int, ...]) -> tuple[int, int]:
        return math.prod(stored[:-1]), stored[-1]

    def laid(self, stored: tuple[int, ...]) -> tuple[int, ...]:
        return self.shape(stored)

    def over(self, stored: tuple[int, ...]) -> Self:
        return replace(self, stack=stored[0] if len(stored) > 2 else 0)


@dataclass(frozen=True)
class ExpertsTransposed(Experts):
    """Such as GPT-OSS has."""

    name = "experts_transposed"
    swapped = True


@dataclass(frozen=True)
class ExpertsByOutput(Experts):
    """Transposed ones by the rows of their outputs: [stack, in, out] is read as [stack * out, in]."""

    def shape(self, stored: tuple[int, ...]) -> tuple[int, int]:
        stack, columns, rows = stored
        return stack * rows, columns


def parameter_op(name: str, stored: tuple[int, ...], is_transposed: bool) -> Op:
    """The op of a module's parameter; one of two axes is never transposed, as in PEFT."""
    kind = ExpertsTransposed if is_transposed and len(stored) > 2 else Experts
    return kind(roles={"weight": name}).over(stored)
