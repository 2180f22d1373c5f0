"""Which adapters of a model in memory run: from now on, within a context, or row by row."""

from collections.abc import Sequence
from contextlib import AbstractContextManager

from torch import nn

from surgery.hosts.within import within
from surgery.procedures.live import mixed_batch as mixing
from surgery.procedures.live import switch


def set_adapter(model: nn.Module, adapter_name: str | Sequence[str]) -> switch.Switched:
    """Run this adapter, or these in their order, from now on; returns a context manager that takes it back.

    Raises StateError for an adapter that is not there, or while merged; UsageError where two cannot run together.

    >>> import surgery, torch
    >>> model = torch.nn.Sequential(torch.nn.Linear(4, 4))
    >>> for name in ("en", "fr"):
    ...     model = surgery.inject(model, surgery.LoraConfig(r=2, target_modules=["0"]), adapter_name=name)
    >>> switched = surgery.set_adapter(model, ["en", "fr"])
    >>> with surgery.set_adapter(model, "fr"), torch.no_grad():
    ...     y = model(torch.randn(3, 4))
    """
    return switch.set_adapter(within(model), adapter_name)


def enable_adapters(model: nn.Module) -> switch.Switched:
    """Run the active adapters again, from now on; returns a context manager that takes it back.

    Raises StateError without adapters, or while merged.

    >>> import surgery, torch
    >>> model = torch.nn.Sequential(torch.nn.Linear(4, 4))
    >>> model = surgery.inject(model, surgery.LoraConfig(r=2, target_modules=["0"], init_lora_weights=False))
    >>> x, off = torch.randn(3, 4), surgery.disable_adapters(model)
    >>> base, on = model(x), surgery.enable_adapters(model)
    >>> bool((model(x) == base).all())
    False
    """
    return switch.enable_adapters(within(model))


def disable_adapters(model: nn.Module) -> switch.Switched:
    """Run the base alone, from now on; returns a context manager that takes it back.

    Raises StateError without adapters, or while merged. `enable_adapters` has an example.
    """
    return switch.disable_adapters(within(model))


def mixed_batch(model: nn.Module, adapter_names: Sequence[str]) -> AbstractContextManager[None]:
    """A context in which each row of a batch runs under the adapter named for it, "__base__" for none.

    Rows are told by the first axis of each adapted layer's input. It takes part in training too, where backward
    belongs within it if activations are recomputed. Raises UsageError unless there is a name for each row,
    StateError for a name that is not there, while merged, and where rows cannot be told.

    >>> import surgery, torch
    >>> model = torch.nn.Sequential(torch.nn.Linear(4, 4))
    >>> for name in ("en", "fr"):
    ...     model = surgery.inject(model, surgery.LoraConfig(r=2, target_modules=["0"]), adapter_name=name)
    >>> with surgery.mixed_batch(model, ["en", "__base__", "fr"]):
    ...     y = model(torch.randn(3, 4))
    """
    return mixing.mixed_batch(within(model), adapter_names)
