"""NameMap: how the tensors of files become those of a model in memory, where they are not the same.

Newer models hold the matrices of all experts in one parameter, and files hold a tensor for each expert.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple


class Stack(NamedTuple):
    """`parts` end the names in files, * being the number of the expert; those of one stand one below another."""

    parts: tuple[str, ...]
    whole: str  # how the name ends in memory


class Part(NamedTuple):
    """What a tensor of a file is of a parameter in memory."""

    whole: str
    expert: int
    place: int
    stack: Stack


@dataclass(frozen=True)
class NameMap:
    """`rename` gives the name in memory, stacks aside; then `stacks`."""

    rename: Callable[[str], str]
    stacks: Sequence[Stack]

    def part(self, name: str) -> Part | None:
        """Of a stack, by the name that `rename` gives; None for what is a parameter by itself.

        >>> USUAL.part("layers.0.mlp.experts.7.up_proj.weight")[:3]
        ('layers.0.mlp.experts.gate_up_proj', 7, 1)
        """
        found = _NUMBER.search(name)
        if found is None:
            return None
        for pattern, place, stack in self._patterns.get(name[found.end() :], ()):
            if match := pattern.fullmatch(name):
                return Part(match[1] + stack.whole, int(match[2]), place, stack)
        return None

    @cached_property
    def _patterns(self) -> Mapping[str, Sequence[tuple[re.Pattern[str], int, Stack]]]:
        """By what follows the expert's number."""
        found: dict[str, list[tuple[re.Pattern[str], int, Stack]]] = {}
        for stack in self.stacks:
            for place, part in enumerate(stack.parts):
                before, _, after = part.partition("*")
                pattern = re.compile(rf"(.*){re.escape(before)}(\d+){re.escape(after)}")
                found.setdefault(after, []).append((pattern, place, stack))
        return found


_NUMBER = re.compile(r"experts\.\d+(?=\.)")

USUAL = NameMap(
    rename=lambda name: name.replace(".block_sparse_moe.", ".mlp."),
    stacks=(
        Stack((".experts.*.gate_proj.weight", ".experts.*.up_proj.weight"), ".experts.gate_up_proj"),
        Stack((".experts.*.down_proj.weight",), ".experts.down_proj"),
        Stack((".experts.*.w1.weight", ".experts.*.w3.weight"), ".experts.gate_up_proj"),
        Stack((".experts.*.w2.weight",), ".experts.down_proj"),
    ),
)
"""What Mixtral, Qwen's and DeepSeek's families have, where nothing else is known."""
