"""Room: tensors held so that those of another adapter, of another rank and scaling, can take their place."""

from collections.abc import Mapping
from typing import Protocol

from torch import Tensor

from surgery.core.method import Method, Params, Run
from surgery.core.op import Op
from surgery.core.site import Site
from surgery.core.spec import Spec


class Room(Protocol):
    """At one site. What runs reads tensors alone, so that no number of an adapter is a constant in what is compiled."""

    def tensors(self, site: Site) -> Mapping[str, Spec]:
        """What is held, by role."""
        ...

    def laid(self, method: Method, p: Params, where: str) -> Params:
        """The tensors of an adapter as they are held. ShapeError without room, MatchError for another method."""
        ...

    def own(self, method: Method, held: Params) -> Params:
        """The inverse: what of them is the adapter's."""
        ...

    def branch(self, x: Tensor, run: Run, op: Op, held: Params, training: bool) -> Tensor:
        """What the adapter that is held makes of an input; as `Method.branch`."""
        ...
