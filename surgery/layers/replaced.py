"""Replaced: a module that adapters train whole, with a copy of it for each."""

from typing import Any, NamedTuple

from torch import Tensor, nn

from surgery.core.op import Op
from surgery.layers.called import inputs_of
from surgery.layers.mixed import BASE, Rows, has_batch, read_while_mixed


class Apart(NamedTuple):
    """How a batch is mixed here."""

    site: str
    op: Op
    rows: Rows


class Spelled(NamedTuple):
    """What a live model calls the module itself, and what holds the copies."""

    original: str = "original_module"
    copies: str = "modules_to_save"


class Replaced(nn.Module):
    """Runs the active adapter's copy, or the original. Spelled as PEFT does, for the adapter that came first."""

    apart: Apart | None = None
    spelled = Spelled()
    merged = False  # does the copy that runs count as the model's own, until it is unmerged?

    def __init__(self, original: nn.Module, spelled: Spelled = spelled) -> None:
        super().__init__()
        self.spelled = spelled
        self.add_module(spelled.original, original)
        self.add_module(spelled.copies, nn.ModuleDict())
        self.active: tuple[str, ...] = ()
        self.enabled = True

    @property
    def original(self) -> nn.Module:
        return self.get_submodule(self.spelled.original)

    @property
    def copies(self) -> nn.ModuleDict:
        """By adapter."""
        held = self._modules[self.spelled.copies]
        assert isinstance(held, nn.ModuleDict)
        return held

    def activate(self, adapters: tuple[str, ...], enabled: bool) -> None:
        """The last of `adapters` that has a copy runs from now on, if `enabled`."""
        self.active = tuple(name for name in adapters if name in self.copies)
        self.enabled = enabled
        self.apart = None

    def mix(self, site: str, op: Op, rows: Rows) -> None:
        """Each row of a batch runs through its own adapter's copy from now on, until `activate`."""
        self.activate((), self.enabled)
        self.apart = Apart(site, op, rows)

    @property
    def running(self) -> nn.Module:
        if self.enabled and self.active:
            return self.copies[self.active[-1]]
        return self.original

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if self.apart is None:
            return self.running(*args, **kwargs)
        args = inputs_of(self.original, args, kwargs)
        if not args:
            return self.running(**kwargs)  # which says what is missing
        x, *rest = args
        self.apart.rows.refuse_unlike(self.apart.site, x, has_batch(x, self.apart.op))
        return self.apart.rows.apart(x, lambda name, part, _: self._copy(name)(part, *rest, **kwargs))

    def _copy(self, adapter: str) -> nn.Module:
        return self.original if adapter == BASE else self.copies[adapter]

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name in self.spelled:  # while being unpickled
                raise
            found = getattr(self.running, name)
            if self.apart is not None and isinstance(found, Tensor):
                raise read_while_mixed(self.apart.site) from None
            return found
