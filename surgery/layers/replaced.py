"""Replaced: a module of `modules_to_save`, with a trained copy of it for each adapter."""

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


class Replaced(nn.Module):
    """Runs the active adapter's copy, or `original_module`. Spelled as PEFT does."""

    apart: Apart | None = None

    def __init__(self, original_module: nn.Module) -> None:
        super().__init__()
        self.original_module = original_module
        self.modules_to_save = nn.ModuleDict()
        self.active: tuple[str, ...] = ()
        self.enabled = True

    def activate(self, adapters: tuple[str, ...], enabled: bool) -> None:
        """The last of `adapters` that has a copy runs from now on, if `enabled`."""
        self.active = tuple(name for name in adapters if name in self.modules_to_save)
        self.enabled = enabled
        self.apart = None

    def mix(self, site: str, op: Op, rows: Rows) -> None:
        """Each row of a batch runs through its own adapter's copy from now on, until `activate`."""
        self.activate((), self.enabled)
        self.apart = Apart(site, op, rows)

    @property
    def running(self) -> nn.Module:
        if self.enabled and self.active:
            return self.modules_to_save[self.active[-1]]
        return self.original_module

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if self.apart is None:
            return self.running(*args, **kwargs)
        args = inputs_of(self.original_module, args, kwargs)
        if not args:
            return self.running(**kwargs)  # which says what is missing
        x, *rest = args
        self.apart.rows.refuse_unlike(self.apart.site, x, has_batch(x, self.apart.op))
        return self.apart.rows.apart(x, lambda name, part, _: self._copy(name)(part, *rest, **kwargs))

    def _copy(self, adapter: str) -> nn.Module:
        return self.original_module if adapter == BASE else self.modules_to_save[adapter]

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name in ("original_module", "modules_to_save"):
                raise
            found = getattr(self.running, name)
            if self.apart is not None and isinstance(found, Tensor):
                raise read_while_mixed(self.apart.site) from None
            return found
