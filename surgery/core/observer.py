"""Observer: what a fresh adapter gathers of one layer while examples run, before it starts there."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import ClassVar

from torch import Tensor

from surgery.core.method import Dense, Method, Params
from surgery.core.site import Site


class Observer(ABC):
    """What it holds does not grow with the examples."""

    start: ClassVar[str]  # the init that asks for it
    until_settled: ClassVar[bool] = False  # do examples run until the config is content, for all layers at once?
    backward: ClassVar[bool] = False  # does it see gradients too?
    left_out: int | None = None  # positions with this label do not count

    @property
    @abstractmethod
    def nbytes(self) -> int:
        """Of what it holds."""

    @abstractmethod
    def see(self, x: Tensor, grad: Tensor | None) -> None:
        """An input [rows, in] of the layer, and where it asks for it the loss's gradient [rows, out] there."""

    @abstractmethod
    def seen(self) -> bool:
        """Has it seen anything?"""

    @abstractmethod
    def begin(self, site: Site, method: Method, base: Callable[[], Dense]) -> Params:
        """The tensors that the method starts with, in place of those of its `init`."""
