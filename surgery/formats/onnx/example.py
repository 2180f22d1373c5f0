"""Example: inputs that a graph is traced with, and which of their axes may have other sizes."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from itertools import count
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from surgery.core.leaves import leaves
from surgery.errors import UsageError, printable
from surgery.hosts.twin import computed

BATCH = "batch"
CACHE = "past_key_values"
Axes = Mapping[str, Mapping[int, str]]


Sizes = Mapping[str, int]


def _call(module: nn.Module, inputs: Mapping[str, Any]) -> Any:
    return module(**inputs)


class Decoding(NamedTuple):
    """Greedy decoding with a cache: a prompt [1, length], how many tokens, and how the model itself finds them."""

    prompt: Tensor
    steps: int
    tokens: Callable[[nn.Module, Tensor, int], Tensor]


class Example(NamedTuple):
    """Inputs by the names of forward's parameters; of each, the axes that may have any size, by name.

    `fixed` are arguments that the graph has no inputs for. `make` gives inputs of other sizes, from a seed; without
    it their elements are drawn from those that are here. `call` runs the module, where it is not called with the
    inputs as they are. `tried` are the sizes to compare at.
    """

    inputs: Mapping[str, Tensor]
    axes: Axes
    fixed: Mapping[str, Any] = {}
    make: Callable[[Sizes, int], Mapping[str, Tensor]] | None = None
    call: Callable[[nn.Module, Mapping[str, Any]], Any] = _call
    tried: tuple[Sizes, ...] = ()
    decoding: Decoding | None = None

    def run(self, module: nn.Module, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The module's outputs by name: those it gives them, else `output`, and a number where there are more."""
        given = self.call(module, {**inputs, **self.fixed})
        flat = leaves(given, "output" if isinstance(given, tuple | list) else "")
        # A decoder may give its cache though it is told not to.
        return {name: _tensor(name, value) for name, value in flat if CACHE not in name.split(".")}

    @property
    def sizes(self) -> dict[str, int]:
        """Of each named axis, its size here."""
        return {symbol: self.inputs[name].shape[i] for name, axes in self.axes.items() for i, symbol in axes.items()}

    def to_trace(self) -> dict[str, Tensor]:
        """Inputs of sizes that the exporter makes no constants of: none is 1, and no two are equal."""
        told: dict[str, int] = {}
        for symbol, size in self.sizes.items():
            told[symbol] = next(n for n in count(max(size, 2)) if n not in told.values())
        return self.sized(told)

    def trials(self) -> list[dict[str, Tensor]]:
        """A batch of one, the example itself, and a larger one; or of the sizes to be tried."""
        if self.tried:
            return [self.sized(sizes, seed) for seed, sizes in enumerate(self.tried)]
        sizes = self.sizes
        return [
            self.sized({**sizes, **({BATCH: 1} if BATCH in sizes else {})}, 1),
            dict(self.inputs),
            self.sized({symbol: size + 2 for symbol, size in sizes.items()}, 2),
        ]

    def sized(self, sizes: Sizes, seed: int = 0) -> dict[str, Tensor]:
        """Inputs of other sizes along the axes that have names."""
        if self.make is not None:
            return dict(self.make(sizes, seed))
        generator = torch.Generator().manual_seed(seed)
        return {name: self._sized(name, sizes, generator) for name in self.inputs}

    def _sized(self, name: str, sizes: Sizes, generator: torch.Generator) -> Tensor:
        values = self.inputs[name]
        for axis, symbol in self.axes.get(name, {}).items():
            chosen = torch.randint(values.shape[axis], (sizes[symbol],), generator=generator)
            values = values.index_select(axis, chosen)
        return values


def _tensor(name: str, value: Any) -> Tensor:
    if not isinstance(value, Tensor):
        raise TypeError(f"the output {name} is a {type(value).__name__}; tensors are wanted")
    return value


def example_of(module: nn.Module, inputs: Any, axes: Axes | None) -> Example:
    """From a tensor, a sequence in forward's order, or a mapping by its names.

    By default the first axis of each input is "batch". UsageError for what fits no parameter of forward.
    """
    named = _named(module, inputs)
    if axes is None:
        axes = {name: {0: BATCH} for name, values in named.items() if values.dim()}
    for name, told in axes.items():
        if name not in named:
            raise UsageError(f"dynamic_axes: no input {printable(name)!r}; inputs are {', '.join(named)}")
        for axis in told:
            if not 0 <= axis < named[name].dim() or named[name].shape[axis] == 0:
                raise UsageError(
                    f"dynamic_axes: {name} is {list(named[name].shape)}; it has no elements on axis {axis}"
                )
    return Example(named, axes)


def _named(module: nn.Module, inputs: Any) -> dict[str, Tensor]:
    parameters = list(inspect.signature(module.forward).parameters.values())
    given = (inputs,) if isinstance(inputs, Tensor) else inputs
    if isinstance(given, Sequence):
        names = [one.name for one in parameters if one.kind is one.POSITIONAL_OR_KEYWORD]
        if len(given) > len(names):
            raise UsageError(f"inputs: {len(given)} of them; forward takes {', '.join(names) or 'none by name'}")
        given = dict(zip(names, given, strict=False))
    if not isinstance(given, Mapping) or not given:
        raise UsageError("inputs: a tensor, a sequence of tensors, or a mapping by forward's names is wanted")
    for name, values in given.items():
        if not isinstance(name, str) or not isinstance(values, Tensor):
            raise UsageError(f"inputs: {printable(name)} is a {type(values).__name__}; a tensor is wanted")
    takes_any = any(one.kind is one.VAR_KEYWORD for one in parameters)
    unknown = [] if takes_any else sorted(given.keys() - {one.name for one in parameters})
    if unknown:
        raise UsageError(f"inputs: forward has no parameter {printable(unknown[0])!r}")
    return {name: values.detach().cpu().to(computed(values.dtype)) for name, values in given.items()}
