"""trace: a module without weights -> a graph. The one place that calls torch.onnx."""

import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr
from functools import partial
from io import StringIO
from typing import Any

import torch
from torch import Tensor, nn

from surgery.core.collector import collector_paused
from surgery.errors import EnvironmentFault, InputError
from surgery.formats.onnx.example import Example
from surgery.formats.onnx.refusal import refuse_random, refuse_writing, refused
from surgery.formats.onnx.writes import written_by

PREFIX = "traced."  # what the names of weights begin with in the graph
_TOO_LARGE = (RuntimeError, ValueError, IndexError)  # what modules raise of sizes that they have no place for
_LOGGERS = ("torch", "torch.onnx", "onnxscript", "onnx_ir")


class Flat(nn.Module):
    """A module whose inputs come in order, and whose outputs are tensors by name."""

    def __init__(self, traced: nn.Module, example: Example) -> None:
        super().__init__()
        self.traced, self.example = traced, example

    def forward(self, *given: Tensor) -> dict[str, Tensor]:
        return self.example.run(self.traced, dict(zip(self.example.inputs, given, strict=True)))


def trace(module: nn.Module, mode: Any, example: Example) -> Any:
    """The graph (onnx_ir.Model) of a module whose parameters are of the fake `mode`.

    InputError, naming the module, for what cannot be traced, has no ONNX operator, or is random.
    """
    require_packages()
    given = example.to_trace()
    with mode:
        fake = tuple(mode.from_tensor(values) for values in given.values())
    flat = Flat(module, example).eval()
    refuse_writing(written_by(flat, fake, mode))  # such as reach a parameter by its .data crash torch's exporter
    try:
        program = _program(flat, fake, list(given), example)
    except torch.onnx.OnnxExporterError as error:  # whatever the module itself raises is its cause
        raise refused(error, module, example) from error
    exported: Any = program.exported_program
    refuse_random(exported, module)
    refuse_writing(exported.graph_signature.parameters_to_mutate.values())
    _refuse_bounded(exported, module, partial(_runs, flat, fake, mode))
    names: Any = exported.call_spec.out_spec
    for output, name in zip(program.model.graph.outputs, names.context, strict=True):
        output.name = name
    return program.model


def _program(flat: Flat, given: tuple[Tensor, ...], names: list[str], example: Example) -> Any:
    dynamic = tuple(dict.fromkeys(example.axes.get(name, ()), torch.export.Dim.DYNAMIC) for name in names)
    with quiet(), collector_paused(), torch.no_grad():
        return torch.onnx.export(
            flat,
            given,
            dynamo=True,
            optimize=False,
            verbose=False,
            input_names=names,
            dynamic_shapes=(dynamic,),
        )


def _refuse_bounded(program: Any, module: nn.Module, runs: Callable[[Sequence[Sequence[int]]], bool]) -> None:
    """InputError where the graph holds for some sizes alone, and beyond the module does another thing, or `runs`."""
    from torch.utils._sympy.numbers import int_oo

    inputs = {node.name: node.meta["val"] for node in program.graph.nodes if node.op == "placeholder"}
    shapes = [inputs[name].shape for name in program.graph_signature.user_inputs]
    for symbol, span in program.range_constraints.items():
        if span.upper != int_oo and runs([[_size(axis, symbol, span.upper) for axis in shape] for shape in shapes]):
            raise InputError(
                f"{type(module).__name__}: its graph would hold up to a size of {span.upper} along an axis, as it does "
                "another thing beyond; leave that axis out of dynamic_axes, or take out what asks for the size"
            )


def _size(axis: Any, symbol: Any, bound: Any) -> int:
    """Of an axis of an input, where what `symbol` stands for is one more than it may be; 0 where it is another."""
    expression = axis.node.expr if isinstance(axis, torch.SymInt) else None
    if expression is None or expression.free_symbols != {symbol}:
        return 0
    return int(expression.xreplace({symbol: bound + 1}))


def _runs(flat: nn.Module, given: Sequence[Tensor], mode: Any, sizes: Sequence[Sequence[int]]) -> bool:
    """Does the module take inputs of these sizes? Where one is 0 it is as in `given`."""
    with mode, torch.no_grad():
        shapes = [
            [a or b for a, b in zip(one, held.shape, strict=True)] for one, held in zip(sizes, given, strict=True)
        ]
        try:
            flat(*(torch.zeros(shape, dtype=held.dtype) for shape, held in zip(shapes, given, strict=True)))
        except _TOO_LARGE:  # as it refuses them by itself, so may the graph
            return False
    return True


def require_packages() -> None:
    """EnvironmentFault naming the extra, if a package is missing."""
    try:
        import onnx_ir  # noqa: F401
        import onnxruntime  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise EnvironmentFault(f'export: {error.name} is missing; pip install "model-surgery[onnx]"') from error


@contextmanager
def quiet() -> Iterator[None]:
    """What the exporter tells of itself is not shown: what it fails at, it raises."""
    loggers = [logging.getLogger(name) for name in _LOGGERS]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings(), redirect_stderr(StringIO()):  # torch prints the graph that it gives up
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
