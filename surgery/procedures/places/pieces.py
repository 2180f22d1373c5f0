"""Pieces: the tensors that files hold of what is one stack in memory."""

from collections.abc import Iterator
from dataclasses import dataclass, field

from surgery.core.name_map import Part, Stack
from surgery.core.site import TensorInfo
from surgery.errors import MatchError, printable


@dataclass
class Pieces:
    """What files hold of a stack, by expert and place."""

    stack: Stack
    held: dict[tuple[int, int], TensorInfo] = field(default_factory=dict)

    def add(self, part: Part, info: TensorInfo) -> None:
        if self.stack != part.stack or (part.expert, part.place) in self.held:
            raise MatchError(
                f"{printable(info.name)}: another tensor is the same part of {printable(part.whole)}; one is wanted; "
                "the base is damaged"
            )
        self.held[part.expert, part.place] = info

    @property
    def experts(self) -> int:
        return 1 + max(expert for expert, _ in self.held)

    def rows(self) -> Iterator[tuple[int, slice, TensorInfo]]:
        """Of each expert the pieces, and which of its rows each is."""
        for expert in range(self.experts):
            at = 0
            for place in range(len(self.stack.parts)):
                info = self.held[expert, place]
                yield expert, slice(at, at + info.shape[0]), info
                at += info.shape[0]

    def whole(self, name: str) -> TensorInfo:
        """The parameter in memory. MatchError where the pieces do not make one."""
        places = range(len(self.stack.parts))
        first = [self.held.get((0, place)) for place in places]
        for expert in range(self.experts):
            for place in places:
                one, like = self.held.get((expert, place)), first[place]
                if one is None or like is None or (one.shape, one.dtype) != (like.shape, like.dtype):
                    found = "is missing" if one is None else f"is {list(one.shape)} in {one.dtype}"
                    raise MatchError(
                        f"{printable(name)}: {printable(self.stack.parts[place])} of expert {expert} {found}; one of "
                        "each expert, all alike, is wanted; the base is damaged"
                    )
        shapes = [one.shape for one in first if one is not None]
        if {len(shape) for shape in shapes} != {2} or len({shape[1] for shape in shapes}) != 1:
            raise MatchError(f"{printable(name)}: its pieces are {shapes}; matrices of as many columns are wanted")
        rows = sum(shape[0] for shape in shapes)
        return TensorInfo(name, self.held[0, 0].dtype, (self.experts, rows, shapes[0][1]))
