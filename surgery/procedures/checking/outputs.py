"""outputs: what a model, or any callable, gives for some inputs; in its own dtype, and in float64."""

import copy
import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from itertools import chain
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from surgery.core.agreement import Outputs, floors
from surgery.core.distance import Distance
from surgery.core.leaves import leaves

Runs = Callable[..., Any]  # a module, or any callable
Inputs = Tensor | Sequence[Any] | Mapping[str, Any]  # one argument, several, or keyword arguments


class Given(NamedTuple):
    """The tensors of an outcome by name, and what else is in it, by name and type."""

    outputs: dict[str, Tensor]
    left_out: tuple[str, ...]


def run(model: Runs, inputs: Inputs, watched: Collection[str] = ()) -> Given:
    """The outcome of a call, in eval mode, without gradients; and what the `watched` modules give in it.

    A tensor alone is called "output", others by their key or number, and a module's by `layer` and its path. Numbers
    that it draws, as ViTMAE does to mask, are the same in each run; what it masks by its dtype's lowest number is -inf.
    """
    if not isinstance(model, nn.Module) or own_dtype(model, inputs) != torch.float64:
        return _run(model, inputs, watched)
    with in_float64():
        found = _run(model, inputs, watched)
        if _count_of_nan(found):  # some make a mask in the default dtype, which the lowest of float64 overflows
            with by_default(torch.float64):
                again = _run(model, inputs, watched)
            found = min(found, again, key=_count_of_nan)
    return found


@contextmanager
def in_float64() -> Iterator[None]:
    """Attention by its definition: on a CPU, torch's fast kernel misreads a float32 mask beside float64 values."""
    with sdpa_kernel(SDPBackend.MATH):
        yield


def _run(model: Runs, inputs: Inputs, watched: Collection[str]) -> Given:
    with torch.no_grad(), ExitStack() as stack:
        seen: dict[str, Any] = {}
        stack.enter_context(drawing_alike(_devices(model, inputs)))
        if isinstance(model, nn.Module):
            stack.enter_context(evaluating(model))
            stack.enter_context(_watching(model, watched, seen))
        outcome = _given(call(model, inputs))
        found = Given(outcome.outputs | _given(seen).outputs, outcome.left_out)
    most = torch.finfo(own_dtype(model, inputs)).max if isinstance(model, nn.Module) else math.inf
    return found._replace(outputs={name: _unmasked(values, most) for name, values in found.outputs.items()})


@contextmanager
def drawing_alike(devices: Collection[torch.device]) -> Iterator[None]:
    """Numbers that are drawn on these devices are the same each time, and others are drawn as if these had not been."""
    generators = [torch.default_generator, *filter(None, map(_generator, devices))]
    states = [one.get_state() for one in generators]
    for one in generators:
        one.manual_seed(0)
    try:
        yield
    finally:
        for one, state in zip(generators, states, strict=True):
            one.set_state(state)


def _generator(device: torch.device) -> torch.Generator | None:
    """From which it draws by default, where it is not the CPU and torch holds one for each of its kind."""
    every: Sequence[torch.Generator] = getattr(getattr(torch, device.type, None), "default_generators", ())
    return every[device.index or 0] if every else None


def _devices(model: Runs, inputs: Inputs) -> set[torch.device]:
    held = chain(model.parameters(), model.buffers()) if isinstance(model, nn.Module) else ()
    return {one.device for one in chain(held, _given(inputs).outputs.values())}


def _unmasked(values: Tensor, most: float) -> Tensor:
    """Logits that are masked by the lowest number of their dtype, or of the model's, are alike in all dtypes then."""
    if not values.is_floating_point() or values.dtype.itemsize < 2:
        return values
    return values.masked_fill(values < _LOWEST * min(most, torch.finfo(values.dtype).max), -math.inf)


_LOWEST = -1 + 2.0**-7  # of the largest: a logit more is lost in it


def _count_of_nan(given: Given) -> int:
    return sum(int(torch.isnan(values).sum()) for values in given.outputs.values() if values.is_floating_point())


@contextmanager
def by_default(dtype: torch.dtype) -> Iterator[None]:
    was = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(was)


def twin(model: nn.Module, dtype: torch.dtype = torch.float64) -> nn.Module:
    """A copy in another dtype."""
    return copy.deepcopy(model).to(dtype)


def widened(inputs: Inputs, dtype: torch.dtype = torch.float64) -> Any:
    """The inputs, floats in another dtype."""
    if isinstance(inputs, Tensor):
        return inputs.to(dtype) if inputs.is_floating_point() else inputs
    if isinstance(inputs, Mapping):
        return {name: widened(value, dtype) for name, value in inputs.items()}
    return type(inputs)(widened(one, dtype) for one in inputs) if isinstance(inputs, list | tuple) else inputs


def mask_of(inputs: Inputs) -> Tensor | None:
    """The attention mask of keyword arguments, where there is one of whole rows: what counts in the outputs."""
    mask = inputs.get("attention_mask") if isinstance(inputs, Mapping) else None
    return mask if isinstance(mask, Tensor) and mask.dim() == 2 else None


def own_dtype(model: nn.Module, inputs: Inputs) -> torch.dtype:
    """The dtype of the model's widest floats, of its inputs' where it has none, else float32."""
    held = [values.dtype for values in chain(model.parameters(), model.buffers()) if values.is_floating_point()]
    given = _given(inputs).outputs.values()
    found = held or [values.dtype for values in given if values.is_floating_point()]
    return max(found, key=lambda dtype: -torch.finfo(dtype).eps, default=torch.float32)


def calibrated(model: nn.Module, inputs: Inputs, exact: Outputs, rows: Tensor | None = None) -> dict[str, Distance]:
    """The model's noise floors, from its run in its own dtype, and `exact`, its run in float64."""
    narrow, part = narrow_run(model, inputs)
    return {name: floor.scaled(part) for name, floor in floors(narrow, exact, rows).items()}


def narrow_run(model: nn.Module, inputs: Inputs, watched: Collection[str] = ()) -> tuple[Outputs, float]:
    """The run in the model's own dtype; in float32 where that is float64, and by what its errors are too large then.

    Rounding errors are in proportion to eps.
    """
    if own_dtype(model, inputs) != torch.float64:
        return run(model, inputs, watched).outputs, 1.0
    smaller = torch.finfo(torch.float64).eps / torch.finfo(torch.float32).eps
    return run(twin(model, torch.float32), widened(inputs, torch.float32), watched).outputs, smaller


def call(model: Runs, inputs: Inputs) -> Any:
    if isinstance(inputs, Mapping):
        return model(**inputs)
    return model(inputs) if isinstance(inputs, Tensor) else model(*inputs)


def placed(inputs: Any, model: nn.Module) -> Any:
    """The inputs on the model's device."""
    device = next((values.device for values in model.parameters() if not values.is_meta), torch.device("cpu"))
    return _moved(inputs, device)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """In eval mode, and afterwards each module as it was."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def _moved(inputs: Any, device: torch.device) -> Any:
    if isinstance(inputs, Tensor):
        return inputs.to(device)
    if isinstance(inputs, Mapping):
        return {key: _moved(value, device) for key, value in inputs.items()}
    return type(inputs)(_moved(one, device) for one in inputs) if type(inputs) in (list, tuple) else inputs


@contextmanager
def _watching(model: nn.Module, paths: Collection[str], seen: dict[str, Any]) -> Iterator[None]:
    """What each of these modules gives goes into `seen`; of one that is called again, the last."""
    hooks = [
        module.register_forward_hook(partial(_note, seen, path))
        for path, module in model.named_modules()
        if path in paths
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _note(seen: dict[str, Any], path: str, module: nn.Module, inputs: Any, outcome: Any) -> None:
    del module, inputs
    seen.pop(f"layer {path}", None)  # in the order of the calls
    seen[f"layer {path}"] = outcome[0] if isinstance(outcome, tuple) else outcome  # the others: weights, caches


def _given(outcome: Any) -> Given:
    flat = dict(leaves(outcome))
    outputs = {name: torch.as_tensor(value) for name, value in flat.items() if isinstance(value, _TENSORS)}
    left_out = [f"{name} ({type(value).__name__})" for name, value in flat.items() if name not in outputs]
    return Given(outputs, tuple(left_out))


_TENSORS = (Tensor, np.ndarray, float, int)
