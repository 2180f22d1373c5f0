"""Starter: what makes a fresh adapter's tensors of more than the base; an Observer, of examples run through it."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar, Literal

from torch import Tensor

from surgery.core.method import Dense, Params
from surgery.core.site import Site

Held = Callable[[str, Tensor], Tensor]  # a weight [out, in] as the format of that name would hold it


class Starter(ABC):
    """At one site."""

    start: ClassVar[str]  # the init that asks for it

    @abstractmethod
    def begin(self, site: Site, method: Any, base: Callable[[], Dense]) -> Params:
        """The tensors that a method starts with, in place of those of its `init`.

        It is of the kind that a config with this start makes, which each starter names.
        """


class Observer(Starter):
    """What it gathers of its layer while examples run does not grow with them."""

    sees: ClassVar[Literal["inputs", "gradients"]] = "inputs"
    until_settled: ClassVar[bool] = False  # do examples run until the config is content, for all layers at once?
    left_out: int | None = None  # positions with this label do not count

    @property
    @abstractmethod
    def nbytes(self) -> int:
        """Of what it will hold."""

    @abstractmethod
    def see(self, values: Tensor) -> None:
        """Inputs [rows, in] of the layer; or the gradient [out, in] of its weight, by the loss of one batch."""

    @abstractmethod
    def seen(self) -> bool:
        """Has it seen anything?"""
