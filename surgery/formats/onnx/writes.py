"""writes: which of its own parameters a module changes as it runs, told by one run with no numbers in it."""

import copy
from collections.abc import Sequence
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


def written_by(module: nn.Module, given: Sequence[Tensor], mode: Any) -> list[str]:
    """Of a module whose parameters are of the fake `mode`; those that it changes until it ends, or fails.

    It is a copy that runs, for what it keeps from the run, such as tables that it makes once, has no numbers.
    """
    before = {name: _memory(held) for name, held in module.named_parameters()}
    watch, tensors = _Watch(), (*module.parameters(), *module.buffers())
    running = copy.deepcopy(module, {id(held): held for held in tensors})
    with mode, torch.no_grad(), watch:
        running(*given)
    now = {name: _memory(held) for name, held in running.named_parameters()}
    return [name for name, one in before.items() if one in watch.written or now.get(name) != one]


class _Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch's own have no types
    """Keeps what memory is written to. What the module raises is left to the exporter to tell."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.written: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        del types
        named = dict(zip((told.name for told in func._schema.arguments), args, strict=False)) | (kwargs or {})
        for told in func._schema.arguments:
            if told.alias_info is not None and told.alias_info.is_write:
                self.written |= {_memory(one) for one in tree_leaves(named.get(told.name)) if isinstance(one, Tensor)}
        return func(*args, **(kwargs or {}))

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> bool:
        super().__exit__(kind, value, trace)  # type: ignore[no-untyped-call]
        return kind is not None and issubclass(kind, Exception)


def _memory(held: Tensor) -> int:
    return int(held.untyped_storage()._cdata)
