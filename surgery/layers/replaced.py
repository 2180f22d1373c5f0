"""Replaced: a module of `modules_to_save`, with a trained copy of it for each adapter."""

from typing import Any

from torch import nn


class Replaced(nn.Module):
    """Runs the active adapter's copy, or `original_module`. Spelled as PEFT does."""

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

    @property
    def running(self) -> nn.Module:
        if self.enabled and self.active:
            return self.modules_to_save[self.active[-1]]
        return self.original_module

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.running(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name in ("original_module", "modules_to_save"):
                raise
            return getattr(self.running, name)
