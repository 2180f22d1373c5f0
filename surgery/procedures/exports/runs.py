"""runs: what a model gives for the inputs of some trials, in the dtype that it is of."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from surgery.core.agreement import Outputs
from surgery.errors import InputError, printable
from surgery.formats.onnx.example import Example
from surgery.formats.onnx.refusal import place_of
from surgery.procedures.checking.outputs import by_default, in_float64

Inputs = Mapping[str, Tensor]
Prepare = Callable[[nn.Module], None]

_RAISED = (RuntimeError, TypeError, ValueError, AttributeError, LookupError)  # by modules that do not take an input


def prepared(model: nn.Module, prepare: Prepare) -> nn.Module:
    """So that it runs as it was traced."""
    prepare(model)
    return model


def runs(model: nn.Module, trials: Sequence[Inputs], example: Example) -> list[dict[str, Tensor]]:
    """The model's outputs, its floating inputs in its own dtype. InputError, naming the module, where it gives none."""
    dtype = next((one.dtype for one in model.parameters() if one.is_floating_point()), torch.float32)
    with torch.no_grad(), in_float64() if dtype == torch.float64 else nullcontext():
        return [_run(model, _cast(one, dtype), example, dtype) for one in trials]


def shapes(inputs: Inputs) -> dict[str, tuple[int, ...]]:
    return {name: tuple(values.shape) for name, values in inputs.items()}


def in_words(inputs: Inputs) -> str:
    """The shapes in one line."""
    return ", ".join(f"{name} {list(shape)}" for name, shape in shapes(inputs).items())


def refuse_empty(model: nn.Module, trials: Sequence[Inputs], outputs: Sequence[Outputs], example: Example) -> None:
    """InputError, naming the module that begins it, for an output without elements: it would prove nothing."""
    for inputs, given in zip(trials, outputs, strict=True):
        for name, values in given.items():
            if not values.numel():
                where = _first_empty(model, inputs, example) or f"a {type(model).__name__}"
                raise InputError(
                    f"{printable(where)}: what it gives is empty for {in_words(inputs)}, so that nothing can be "
                    f"compared of the output {printable(name)}, {list(values.shape)}; a size that does not hang on "
                    "values is wanted, or an example of which any rows leave something"
                )


def _run(model: nn.Module, inputs: Inputs, example: Example, dtype: torch.dtype) -> dict[str, Tensor]:
    try:
        return example.run(model, inputs)
    except _RAISED as error:
        if not isinstance(error, RuntimeError):
            raise _unfit(model, inputs, dtype, error) from error
    try:
        with by_default(dtype):  # numbers that it makes of its own are float32 otherwise, which float64 does not meet
            return example.run(model, inputs)
    except _RAISED as error:
        raise _unfit(model, inputs, dtype, error) from error


def _unfit(model: nn.Module, inputs: Inputs, dtype: torch.dtype, error: Exception) -> Exception:
    if "memory" in str(error):
        return error
    where = place_of(error, model) or f"a {type(model).__name__}"
    told = str(dtype).removeprefix("torch.")
    return InputError(
        f"{printable(where)}: it does not run in {told} for {in_words(inputs)}, so that nothing can be compared "
        f"({printable(type(error).__name__)}: {printable(error)}); a module that takes any size along dynamic_axes, "
        "in any floating dtype, is wanted"
    )


def _cast(inputs: Inputs, dtype: torch.dtype) -> dict[str, Tensor]:
    return {name: values.to(dtype) if values.is_floating_point() else values for name, values in inputs.items()}


def _first_empty(model: nn.Module, inputs: Inputs, example: Example) -> str:
    """The path of the module that ends first with a tensor of no elements."""
    seen: list[str] = []
    hooks = [one.register_forward_hook(partial(_note, seen, path)) for path, one in model.named_modules() if path]
    try:
        runs(model, [inputs], example)
    finally:
        for hook in hooks:
            hook.remove()
    return next(iter(seen), "")


def _note(seen: list[str], path: str, module: nn.Module, given: Any, out: Any) -> None:
    del module, given
    if isinstance(out, Tensor) and not out.numel():
        seen.append(path)
