"""Mixed: a layer that runs each row of a batch under an adapter of its own."""

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from surgery.core.method import Dense, Method, Params, Run
from surgery.core.op import Op
from surgery.errors import StateError, UsageError, printable

BASE = "__base__"  # PEFT's word for a row without an adapter


class Over(Protocol):
    """An adapter at a layer."""

    def branch(self, x: Tensor, below: Run, op: Op, training: bool) -> Tensor: ...


class Rows:
    """Which rows of a batch belong to which adapter, of those that lie `here`; to BASE the others."""

    def __init__(self, names: Sequence[str], here: Collection[str]) -> None:
        told = [name if name in here else BASE for name in names]
        self.groups = {one: [row for row, name in enumerate(told) if name == one] for one in dict.fromkeys(told)}
        self.count = len(told)
        self._indices: dict[torch.device, tuple[Mapping[str, Tensor], Tensor]] = {}

    def indices(self, device: torch.device) -> tuple[Mapping[str, Tensor], Tensor]:
        """The rows of each group, and where in the groups put together each row lies; made once a device."""
        if device not in self._indices:
            groups = {name: torch.tensor(rows, device=device) for name, rows in self.groups.items()}
            self._indices[device] = groups, torch.cat(list(groups.values())).argsort()
        return self._indices[device]

    def apart(self, x: Tensor, run: Callable[[str, Tensor, Tensor], Tensor]) -> Tensor:
        """What `run` makes of each group's name, its part of `x` and its rows, in the batch's order again."""
        groups, back = self.indices(x.device)
        parts = [run(name, x.index_select(0, index), index) for name, index in groups.items()]
        return torch.cat(parts).index_select(0, back)

    def refuse_unlike(self, site: str, x: Tensor, has_batch: bool) -> None:
        """Rows are told by the first axis: UsageError unless there is one of batches, of the right length."""
        if not has_batch or len(x) != self.count:
            raise UsageError(
                f"{printable(site)}: {self.count} adapter_names, and its input is {list(x.shape)}; one name for each "
                "row of the first axis is wanted; give as many, or run each adapter's rows by themselves"
            )


def read_while_mixed(site: str) -> StateError:
    """What asks for a weight or bias asks for one that there is not."""
    return StateError(
        f"{printable(site)}: its weight is read while a batch is mixed, and rows under several adapters have no weight "
        "in common; run each adapter's rows by themselves, or leave this layer out of the adapters"
    )


def has_batch(x: Tensor, op: Op) -> bool:
    """Does an input of the op begin with an axis of batches?"""
    return x.dim() == len(op.kernel) + 2 if op.kernel else x.dim() > op.accepts_dropout()


class Mixed(NamedTuple):
    """Stands for the one adapter that a layer runs."""

    site: str
    rows: Rows
    over: Mapping[str, Over]

    def branch(self, x: Tensor, below: Run, op: Op, training: bool) -> Tensor:
        """What each row alone would give; the layer below sees the whole batch at once where it can."""
        self.rows.refuse_unlike(self.site, x, has_batch(x, op))
        if len(self.rows.groups) == 1:
            return self._of_group(next(iter(self.rows.groups)), x, below, op, training)
        whole = Whole(x, below)
        return self.rows.apart(
            x, lambda name, part, index: self._of_group(name, part, Part(part, index, whole), op, training)
        )

    @property
    def method(self) -> Method:
        raise read_while_mixed(self.site)

    @property
    def computed(self) -> Params:
        return {}

    def _of_group(self, name: str, x: Tensor, below: Run, op: Op, training: bool) -> Tensor:
        return below(x) if name == BASE else self.over[name].branch(x, below, op, training)


class Whole:
    """The layer below over the whole batch, run once, when first asked."""

    def __init__(self, x: Tensor, below: Run) -> None:
        self.x, self.below = x, below
        self.outcome: Tensor | None = None

    def __call__(self) -> Tensor:
        if self.outcome is None:
            self.outcome = self.below(self.x)
        return self.outcome


class Part:
    """The layer below as the branch over some rows sees it."""

    def __init__(self, x: Tensor, index: Tensor, whole: Whole) -> None:
        self.x, self.index, self.whole = x, index, whole

    def __call__(self, x: Tensor, /) -> Tensor:
        return self.whole().index_select(0, self.index) if x is self.x else self.whole.below(x)

    def base(self) -> Dense:
        return self.whole.below.base()

    def plain(self) -> None:
        return None

    def laid(self) -> Dense:
        return self.whole.below.laid()

    def bias(self) -> Tensor | None:
        return self.whole.below.bias()
