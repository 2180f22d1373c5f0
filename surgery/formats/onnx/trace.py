"""trace: a module without weights -> a graph. The one place that calls torch.onnx."""

import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from surgery.errors import EnvironmentFault, InputError, printable
from surgery.formats.onnx.example import Example

PREFIX = "traced."  # what the names of weights begin with in the graph
_LOGGERS = ("torch.onnx", "onnxscript", "onnx_ir")


class Flat(nn.Module):
    """A module whose inputs come in order, and whose outputs are a tuple of tensors."""

    def __init__(self, traced: nn.Module, example: Example) -> None:
        super().__init__()
        self.traced, self.example = traced, example

    def forward(self, *given: Tensor) -> tuple[Tensor, ...]:
        inputs = dict(zip(self.example.inputs, given, strict=True))
        return tuple(self.example.run(self.traced, inputs).values())


def trace(module: nn.Module, mode: Any, example: Example) -> Any:
    """The graph (onnx_ir.Model) of a module whose parameters are of the fake `mode`.

    InputError, naming the module, for what cannot be traced or has no ONNX operator.
    """
    require_packages()
    given = example.to_trace()
    with mode:
        fake = tuple(mode.from_tensor(values) for values in given.values())
    flat = Flat(module, example).eval()
    dynamic = tuple(dict.fromkeys(example.axes.get(name, ()), torch.export.Dim.DYNAMIC) for name in given)
    with quiet(), torch.no_grad():
        try:
            names = tuple(example.run(module, dict(zip(given, fake, strict=True))))
            program = torch.onnx.export(
                flat,
                fake,
                dynamo=True,
                optimize=False,
                verbose=False,
                input_names=list(given),
                output_names=list(names),
                dynamic_shapes=(dynamic,),
            )
        except (RuntimeError, TypeError, ValueError, AttributeError, NotImplementedError, AssertionError) as error:
            raise _refused(error, module) from error
    assert program is not None
    _refuse_bounded(program.exported_program, module, partial(_runs, flat, fake, mode))
    return program.model


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
        except (RuntimeError, ValueError, IndexError):  # as it refuses them by itself, so may the graph
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
    """What the exporter tells of itself is not shown."""
    loggers = [logging.getLogger(name) for name in _LOGGERS]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _refused(error: BaseException, module: nn.Module) -> InputError:
    causes = list(_causes(error))
    found = next((one for cause in causes if (one := _place(cause.__traceback__, module))), "")
    lines = [line.strip() for line in str(causes[0]).splitlines() if line.strip()] or [type(causes[0]).__name__]
    return InputError(
        f"{printable(found or type(module).__name__)}: it has no ONNX graph ({printable(' '.join(lines[:2]))}); "
        "shapes and operators that do not depend on values are wanted; --debug shows where it stopped"
    )


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """The first cause first."""
    if error is not None:
        yield from _causes(error.__cause__)
        yield error


def _place(trace: TracebackType | None, module: nn.Module) -> str:
    """The path of the innermost module that was at work, and the operator if one was being translated."""
    names = {id(one): name for name, one in module.named_modules()}
    found = ""
    while trace is not None:
        held = trace.tb_frame.f_locals
        found = names.get(id(held.get("self"))) or found
        node = held.get("node")
        if isinstance(node, torch.fx.Node) and node.meta.get("nn_module_stack"):
            path = list(node.meta["nn_module_stack"].values())[-1][0]
            found = f"{path.removeprefix(PREFIX)} ({node.target})"
        trace = trace.tb_next
    return found
