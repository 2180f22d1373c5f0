"""What is done to a traced graph: weights hidden from the optimizer, constants folded, axes named, traces stripped."""

import re
from collections.abc import Iterable, Iterator
from typing import Any

from surgery.formats.onnx.example import Axes
from surgery.formats.onnx.trace import PREFIX, quiet


def simplify(model: Any, hidden: Iterable[str]) -> None:
    """Fold constants, in place. The initializers of the names in `hidden` stay what and as they are.

    What the optimizer does not see it cannot fold: it would transpose every weight, into another file. Its other
    passes take more than linear time.
    """
    from onnxscript import optimizer

    for name in hidden:
        if (value := model.graph.initializers.get(PREFIX + name)) is not None:
            value.const_value = None
    with quiet():
        optimizer.inline(model)
        optimizer.fold_constants(model)
        optimizer.remove_unused_nodes(model)


def strip(model: Any) -> None:
    """Without what the exporter tells of its own work, which is most of a file and holds paths of the machine."""
    for one in (model, model.graph, *_nodes(model.graph), *_values(model)):
        one.metadata_props.clear()
        one.doc_string = None
    model.producer_name, model.producer_version = "surgery", ""


def name_axes(model: Any, axes: Axes) -> None:
    """The symbols of the inputs' axes are called as told, wherever they stand."""
    renamed = {}
    for value in model.graph.inputs:
        for axis, name in axes.get(value.name, {}).items():
            renamed[str(value.shape[axis].value)] = name
    if not renamed:
        return
    pattern = re.compile("|".join(rf"\b{re.escape(symbol)}\b" for symbol in renamed))
    for value in _values(model):
        if value.shape is not None and not value.shape.frozen:
            for i, extent in enumerate(value.shape):
                if not isinstance(extent, int) and extent.value is not None:
                    value.shape[i] = pattern.sub(lambda found: renamed[found[0]], str(extent.value))


def _nodes(graph: Any) -> Iterator[Any]:
    yield from graph.all_nodes()


def _values(model: Any) -> Iterator[Any]:
    yield from model.graph.inputs
    yield from model.graph.initializers.values()
    for node in _nodes(model.graph):
        yield from node.outputs
