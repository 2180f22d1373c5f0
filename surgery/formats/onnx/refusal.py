"""refusal: what torch's exporter says of a module, told once, with the place in the module where it stopped."""

import re
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import nn

from surgery.errors import InputError, printable
from surgery.formats.onnx.example import Example

_STATIC = re.compile(r"inferred a static shape of (\d+) for dimension inputs\['given'\]\[(\d+)\]\.shape\[(\d+)\]")
_ON_VALUES = re.compile(r"data-dependent|DataDependent|DynamicOutputShape|_local_scalar_dense")
_SWITCHES = ("train", "training", "dropout_p")  # with which an operator that may draw numbers draws none


def refused(error: BaseException, module: nn.Module, example: Example) -> InputError:
    """Of all that the exporter tells, the first cause."""
    cause = next(_causes(error))
    where = place_of(cause, module) or type(module).__name__
    return InputError(
        f"{printable(where)}: it has no ONNX graph: {_why(cause, example)}; what this error is raised from, or "
        "`surgery --debug`, tells where it stopped"
    )


def refuse_random(program: Any, module: nn.Module) -> None:
    """InputError where the graph draws random numbers: no two runs give the same."""
    for node in program.graph.nodes:
        if node.op == "call_function" and _draws(node):
            raise InputError(
                f"{printable(_module_of(node) or type(module).__name__)}: it has no ONNX graph that could be compared: "
                f"{node.target} draws random numbers, though the model is in eval mode; take it out, or give its "
                "numbers as an input"
            )


def refuse_writing(parameters: Iterable[str]) -> None:
    """InputError where the module changes its own parameters, by their names in what is traced, as it runs."""
    for name in parameters:
        raise InputError(
            f"{printable(name.partition('.')[2])}: a parameter that the model writes to as it runs, so that no graph "
            "and no two runs would be alike; a module that keeps nothing from one run to the next is wanted"
        )


def _why(cause: BaseException, example: Example) -> str:
    """What was found, and what is wanted."""
    said = " ".join(str(cause).split())
    if fixed := _STATIC.search(said):
        size, given, axis = map(int, fixed.groups())
        name = list(example.inputs)[given]
        symbol = example.axes[name][axis]
        return (
            f"it runs at the traced size alone, {size} along {printable(symbol)}, axis {axis} of {printable(name)}; "
            "a model that takes other sizes is wanted, or an axis that is left out of dynamic_axes"
        )
    if said.startswith("No ONNX function found"):
        return "torch's exporter knows no operator of ONNX for it; other operators are wanted there"
    if _ON_VALUES.search(f"{type(cause).__name__} {said}"):
        return f"what it does depends on values ({printable(_first(said))}); torch.where or torch.cond is wanted"
    told = f"{type(cause).__name__} ({printable(_first(said))})" if said else type(cause).__name__
    return f"{told}; a module that torch.export can trace is wanted"


def _first(said: str) -> str:
    """Its first sentence."""
    return re.split(r"(?<=[.!?]) |  | \(unhinted", said, maxsplit=1)[0].rstrip(".")


def _draws(node: Any) -> bool:
    op = node.target
    if not isinstance(op, torch._ops.OpOverload) or torch.Tag.nondeterministic_seeded not in op.tags:
        return False
    arguments = op._schema.arguments
    told = {one.name: one.default_value for one in arguments}
    told |= dict(zip((one.name for one in arguments), node.args, strict=False)) | node.kwargs
    return all(told.get(name, True) for name in _SWITCHES)


def _causes(error: BaseException) -> Iterator[BaseException]:
    """The first cause first."""
    if error.__cause__ is not None:
        yield from _causes(error.__cause__)
    yield error


def place_of(error: BaseException, module: nn.Module) -> str:
    """The path of the innermost module that was at work when this was raised, and the operator that was translated."""
    names, found, trace = {id(one): name for name, one in module.named_modules()}, "", error.__traceback__
    while trace is not None:
        held = trace.tb_frame.f_locals
        found = names.get(id(held.get("self"))) or found
        node = held.get("node")
        if isinstance(node, torch.fx.Node) and node.op == "call_function":
            found = f"{_module_of(node) or found} ({node.target})".strip()
        trace = trace.tb_next
    return found


def _module_of(node: torch.fx.Node) -> str:
    """Its path below the module that is traced."""
    stack = node.meta.get("nn_module_stack") or {"": ("", None)}
    path: str = list(stack.values())[-1][0]
    return path.partition(".")[2]
