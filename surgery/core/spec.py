"""Spec and Spelling: what a method asks of its tensors, and what their names in files tell."""

from typing import NamedTuple


class Spec(NamedTuple):
    """A method's tensor as PEFT spells it, such as `lora_A.weight`, and its shape."""

    spelling: str
    shape: tuple[int, ...]
    live: str = ""  # how a model spells it, where that is otherwise
    fixed: bool = False  # does training leave it as it began?
    shared: bool = False  # is it one tensor for all sites of the adapter?
    dealt: bool = False  # is it made for all sites together, where files lack it?
    longer: tuple[int, ...] = ()  # axes along which other sites that share it may ask for more

    def fits(self, shape: tuple[int, ...]) -> bool:
        """May a tensor of this shape be it?"""
        if not self.longer or len(shape) != len(self.shape):
            return shape == self.shape
        pairs = enumerate(zip(shape, self.shape, strict=True))
        return all(found >= least if axis in self.longer else found == least for axis, (found, least) in pairs)

    @property
    def held(self) -> tuple[str, str]:
        """In a model: the name above the adapter's, and the one below it, if there is one."""
        name, _, leaf = (self.live or self.spelling).partition(".")
        return name, leaf


class Spelling(NamedTuple):
    """What a tensor's name in a file tells: its role, and the op it is made for, if only one."""

    role: str
    op: str | None = None
    alone: bool = False  # is it the only tensor of its site?
    integers: bool = False  # does it hold indices? In int32 here; files may have others, PEFT on Windows floats
