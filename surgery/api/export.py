"""Exports: a model in memory, or one in files, to ONNX."""

from collections.abc import Mapping, Sequence
from os import PathLike
from pathlib import Path

from torch import Tensor, nn

from surgery.errors import UsageError
from surgery.formats.onnx.example import example_of
from surgery.formats.onnx.trace import require_packages
from surgery.integrations import transformers as hugging
from surgery.procedures.export import AnyModule, ExportReport, export_model

Where = str | PathLike[str]  # a path, or owner/name[@revision] on the Hub


def export_onnx(  # noqa: PLR0913  # three things and their options
    model: nn.Module,
    adapters: None,
    out: Where,
    *,
    inputs: Tensor | Sequence[Tensor] | Mapping[str, Tensor] | None = None,
    dynamic_axes: Mapping[str, Mapping[int, str]] | None = None,
    overwrite: bool = False,
) -> ExportReport:
    """Write the model with its active adapters merged to the new folder `out`: safetensors, and a graph over them.

    `model.onnx` has no weights of its own; its initializers are the bytes of `model.safetensors` beside it.
    `adapters` is None: the active ones are meant. `inputs` are an example, as forward takes them: a tensor, several,
    or by name. `dynamic_axes` names, for each input, the axes that may have any size; by default the first is "batch".
    Halves are stored as they are, and computed in float32. Before anything is at its place, onnxruntime runs the
    graph on several shapes, and its outputs are compared with the model's. Raises CheckError where they differ,
    InputError, naming the module, for what has no graph, EnvironmentFault without `model-surgery[onnx]`,
    OutputExistsError, and as `merge` does. The model stays as it is, to the bit.
    """
    require_packages()
    if adapters is not None:
        raise UsageError("export_onnx: adapters of a model in memory are those that are active; load them, give None")
    pretrained = hugging.is_pretrained(model)
    if inputs is None and not pretrained:
        raise UsageError("export_onnx: inputs are wanted, an example of what forward takes")
    example = hugging.example_for(model) if inputs is None else example_of(model, inputs, dynamic_axes)
    kind = hugging.Pretrained() if pretrained else AnyModule()
    return export_model(model, example, Path(out), kind, overwrite=overwrite)
