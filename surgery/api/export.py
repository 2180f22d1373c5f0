"""Exports: a model in memory, or one in files, to ONNX."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from surgery.api.given import Adapters, Where, checkpoint, refuse_swapped, weighted
from surgery.core.adapter import Weighted
from surgery.errors import UsageError
from surgery.formats.onnx.example import Example, example_of
from surgery.formats.onnx.trace import require_packages
from surgery.hosts.checkpoint import Checkpoint
from surgery.hosts.layout import bytes_of
from surgery.hosts.twin import weightless
from surgery.hosts.within import within
from surgery.integrations import transformers as hugging
from surgery.io.hub import local_path
from surgery.io.place import refuse_overlap
from surgery.procedures.exports.export import AnyModule, ExportReport, Kind, Manner, export_model
from surgery.procedures.exports.export_swappable import Carrying, export_swappable
from surgery.procedures.planning.treatment import Treatment
from surgery.procedures.writing.filling import OnProgress, Pace
from surgery.procedures.writing.merge_checkpoint import Options
from surgery.procedures.writing.small_files import small_files


def export_onnx(  # noqa: PLR0913  # three things and their options
    model: nn.Module | Where,
    adapters: Adapters | None,
    out: Where,
    *,
    inputs: Tensor | Sequence[Tensor] | Mapping[str, Tensor] | None = None,
    dynamic_axes: Mapping[str, Mapping[int, str]] | None = None,
    kv: bool = False,
    swappable: bool = False,
    names: str = "hf",
    weights: str = "link",
    dtype: str | torch.dtype | None = None,
    tied: str = "refuse",
    ops: Mapping[str, str] | None = None,
    into: str | None = None,
    portable: bool = False,
    max_memory: int | str | None = None,
    overwrite: bool = False,
    progress: OnProgress | None = None,
) -> ExportReport:
    """Write the model with its adapters merged to the new folder `out`: safetensors, and an ONNX graph over them.

    `model.onnx` has no weights of its own; its initializers are the bytes of the files beside it. Before anything is
    at its place, onnxruntime runs the graph on several shapes, and its outputs are compared with the model's.

    `model` in memory: `adapters` is None, for the active ones are meant; `inputs` are an example as forward takes
    them, a tensor, several, or by name (models of transformers need none); `dynamic_axes` names, for each input, the
    axes that may have any size, by default the first as "batch". The model stays as it is, to the bit.

    `model` a folder or owner/name[@revision] on the Hub, of transformers: `adapters`, `dtype`, `tied`, `ops`, `into`
    and `progress` as in `merge_checkpoint`, which merges, streaming. Where the model does not fit `max_memory`, in
    bytes or such as "16GB", it is compared layer by layer, and the report says so.

    `kv` gives a decoder of transformers its cache: past_key_values.N.key in, present.N.key out, and so with .value.
    `swappable` writes the base with a slot at each adapted linear layer, called as `names` says ("hf" or "genai"), and
    an .onnx_adapter file for each LoRA. `weights` "copy" gives the graph a file of its own, model.onnx.data.

    Weights of bitsandbytes stay as they are where nothing is merged: 4 bits as MatMulBnb4, or, with `portable`, as
    operators of ONNX alone, int8 as DequantizeLinear.

    Raises CheckError where the outputs differ, InputError, naming the module, for what has no graph, EnvironmentFault
    without `model-surgery[onnx]`, OutputExistsError, and as `merge` and `merge_checkpoint` do; nothing is written then.
    """
    require_packages()
    treatment = Treatment.of(dtype=dtype, tied=tied, ops=ops, into=into)
    asked = _Asked(
        local_path(out),
        Manner(weights, names, overwrite, portable),
        Options(treatment, overwrite=overwrite, pace=Pace(progress=progress)),
        kv=kv,
        swappable=swappable,
    )
    if isinstance(model, nn.Module):
        if adapters is not None or treatment != Treatment():
            raise UsageError("export_onnx: of a model in memory the active adapters are exported; adapters is None")
        return _of_model(within(model), inputs, dynamic_axes, asked)
    if inputs is not None or dynamic_axes is not None:
        raise UsageError("export_onnx: of files, inputs are made of the config; load the model to give others")
    return _of_files(model, [] if adapters is None else adapters, bytes_of(max_memory, "max_memory"), asked)


class _Asked(NamedTuple):
    """Where an export goes to, and how it is made."""

    out: Path
    how: Manner
    options: Options  # of the merge, where it is one of files
    kv: bool
    swappable: bool


def _of_model(model: nn.Module, inputs: Any, axes: Any, asked: _Asked) -> ExportReport:
    example, kind = _example(model, inputs, axes, asked.kv)
    write = export_swappable if asked.swappable else export_model
    return write(model, example, asked.out, kind, asked.how)


def _of_files(where: Where, adapters: Adapters, max_memory: int | None, asked: _Asked) -> ExportReport:
    refuse_swapped(where, adapters)
    with checkpoint(where) as source:
        found = weighted(adapters)
        if asked.swappable:
            return _with_slots(source, found, asked)
        export = hugging.Export(asked.how, asked.kv, max_memory)
        return hugging.export_checkpoint(source, found, asked.out, asked.options, export)


def _with_slots(source: Checkpoint, adapters: Sequence[Weighted], asked: _Asked) -> ExportReport:
    """The base is loaded for it; what lies beside its weights is carried, as a merge carries it."""
    folders = [Path(one.adapter.where) for one in adapters]
    refuse_overlap(asked.out, [source.path, *folders])
    _refuse_for_slots(adapters, asked.options)
    files = small_files(source, folders).contents
    live = hugging.live_model(source, adapters)
    example, kind = _example(live, None, None, asked.kv)
    return export_swappable(live, example, asked.out, Carrying(kind, files), asked.how)


def _example(model: nn.Module, inputs: Any, axes: Any, kv: bool) -> tuple[Example, Kind]:
    """What a model in memory is traced with, and its kind."""
    pretrained = hugging.is_pretrained(model)
    kind: Kind = hugging.Pretrained() if pretrained else AnyModule()
    if inputs is not None and not kv:
        return example_of(model, inputs, axes), kind
    if not pretrained or inputs is not None:
        wanted = "a decoder of transformers alone has a cache" if kv else "inputs are wanted, as forward takes them"
        raise UsageError(f"export_onnx: a {type(model).__name__}{' with inputs' if kv else ''}: {wanted}")
    return (hugging.cached_example(weightless(model)) if kv else hugging.example_for(model)), kind


def _refuse_for_slots(adapters: Sequence[Weighted], options: Options) -> None:
    """UsageError for what slots have no place for."""
    if not adapters:
        raise UsageError("export: there is no adapter to be swapped; name some, or leave `swappable` out")
    if any(weight != 1 for _, weight in adapters):
        raise UsageError("export: a swappable adapter has no weight; `surgery combine` writes one that has it in it")
    if options.treatment != Treatment():
        raise UsageError(
            "export: nothing is merged with `swappable`; leave that, or `dtype`, `tied`, `ops` and `into`, out"
        )
