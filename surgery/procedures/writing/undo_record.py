"""UndoRecord: the folder `surgery.undo` of a reversible merge, as it is written and read.

record.json lists by tensor where its index streams, or the tensor itself, lie: in `streams-0` for the first
file of the base, and so on. Beside it are the adapters that were merged, and the small files whose bytes the
merge changed. No file in it ends in `.safetensors`, which loaders look for.
"""

import base64
import hashlib
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from surgery.adapters.peft import check_shapes, open_adapter
from surgery.core.adapter import Adapter, Layer, Weighted, bias_layers
from surgery.core.op import Op
from surgery.core.site import Site, TensorInfo
from surgery.core.undo import LONGEST
from surgery.errors import CheckError, FormatError, printable
from surgery.hosts.change import Change
from surgery.hosts.checkpoint import Checkpoint
from surgery.hosts.layout import layout_of
from surgery.hosts.unmerged import Undo
from surgery.io.octets import tensor_from
from surgery.io.regular import contained, file_sha256
from surgery.io.strict_json import parse_json, read_bytes
from surgery.io.tensor_file import read_span
from surgery.ops import ROLES
from surgery.ops.bias import Bias

FOLDER, RECORD = "surgery.undo", "record.json"
FORMAT = 2


class UndoRecord:
    """The record of a merged folder. FormatError if it is none; CheckError if it has been changed."""

    def __init__(self, merged: Path) -> None:
        self.folder = merged / FOLDER
        if not self.folder.is_dir():
            raise FormatError(
                f"{printable(merged)}: no {FOLDER} in it; only a merge made with `reversible` can be unmerged"
            )
        told, where = read_bytes(contained(self.folder, RECORD), "an undo record"), printable(self.folder / RECORD)
        self.sha256 = hashlib.sha256(told).hexdigest()
        data = parse_json(told, where)
        try:
            self._take(data)
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
            raise FormatError(f"{printable(self.folder)}: record.json is damaged ({printable(error)})") from error

    def _take(self, data: Mapping[str, Any]) -> None:
        if data["format"] != FORMAT:
            raise FormatError(
                f"{printable(self.folder)}: format {printable(data['format'])}; this version reads {FORMAT}"
            )
        self.weights = [float.fromhex(weight) for weight in data["weights"]]
        self.files: dict[str, str] = dict(data["files"])
        self.displaced: list[str] = list(data["displaced"])
        self.headers = {name: base64.b64decode(raw) for name, raw in data["headers"].items()}
        self.layout = layout_of(self.headers, data["sizes"])
        self.biases = {info.name: info for info in self.layout.infos() if info.name.endswith(".bias")}
        self.tensors: dict[str, dict[str, Any]] = data["tensors"]
        self.streams_sha256: dict[str, str] = dict(data["streams_sha256"])
        for name in (*self.files, *self.displaced, *self.headers, *self.streams_sha256):
            if Path(name).is_absolute() or ".." in Path(name).parts:
                raise FormatError(f"{printable(self.folder)}: {printable(name)} leads out of the folder")
        for name, field in self.tensors.items():
            if field["file"] not in self.streams_sha256 or (field.get("layers") and field["op"] not in ROLES):
                raise FormatError(f"{printable(self.folder)}: {RECORD} is damaged at {printable(name)}")
            kept, streams, sums = field.get("kept", [0, 0]), field.get("streams", {}), field.get("sums", {})
            for at, size in (kept, *streams.values(), *sums.values()):
                _check_span(contained(self.folder, field["file"]), at, size)
            if not all(bits.isdecimal() and 0 < int(bits) <= LONGEST for bits in streams):
                raise FormatError(f"{printable(self.folder)}: {RECORD} is damaged at {printable(name)}")

    def check(self) -> None:
        """CheckError if the streams are not those that the merge wrote."""
        for name, wanted in self.streams_sha256.items():
            if not (self.folder / name).is_file() or file_sha256(contained(self.folder, name)) != wanted:
                raise CheckError(
                    f"{printable(self.folder / name)}: it was changed after the merge, which cannot be undone; "
                    "bring back a copy of it"
                )

    def changes(self, merged: Checkpoint) -> list[Change]:
        """What was merged into each tensor, in the order in which the originals are written."""
        try:
            laid = {index for field in self.tensors.values() for index, _ in field.get("layers", ())}
            adapters = {at: Weighted(self._adapter(at), one) for at, one in enumerate(self.weights) if at in laid}
            return [self._change(info, merged, adapters) for info in self.layout.infos() if info.name in self.tensors]
        except (KeyError, IndexError, TypeError, ValueError) as error:
            raise FormatError(f"{printable(self.folder)}: record.json is damaged ({printable(error)})") from error

    def _adapter(self, index: int) -> Adapter:
        return open_adapter(contained(self.folder, f"adapter-{index}.tensors"), f"adapter-{index}.json")

    def _change(self, info: TensorInfo, merged: Checkpoint, adapters: Mapping[int, Weighted]) -> Change:
        field = self.tensors[info.name]
        there = merged.at[info.name][1].info if info.name in merged.at else None
        op = ROLES[field["op"]].over(info.shape) if field.get("op") else None
        layers = []
        for position, (index, name) in enumerate(field.get("layers", ())):
            adapter, weight = adapters[index]
            sums = self._sums(field, str(position), info, op)
            params = adapter.sites[name]  # first: any other name is no site
            method = adapter.config.method(name).weighted(weight)
            if op is not None and op.name in {"linear", "conv1d", "embedding"}:  # others know more than their name
                site = Site(info.name, {"weight": info, **self._bias_of(info)}, op)
                check_shapes(name, params, method.tensors(site), RECORD)
                method.check_values(params, site, RECORD)
            layers.append(Layer(method, params, index, name, sums))
        held = info if there is None else info._replace(dtype=there.dtype)
        new = there is None or there.shape != info.shape or info.name in merged.packed
        site = Site(info.name, {"weight": held}, op)
        laid = bias_layers(layers, site) if field.get("op") == Bias.name else tuple(layers)
        for layer in laid:
            if layer.method.couples and layer.sums is None:
                raise FormatError(f"{printable(self.folder)}: {RECORD} lacks the sums of {printable(layer.name)}")
        return Change(site, info.torch_dtype, laid, new=new)

    def _bias_of(self, info: TensorInfo) -> Mapping[str, TensorInfo]:
        """Of the module of a weight, or of this bias itself."""
        there = self.biases.get(f"{info.name.rpartition('.')[0]}.bias")
        return {} if there is None else {"bias": there}

    def undo(self, change: Change) -> Undo:
        """What the weight of `change` needs; read anew at each call."""
        field = self.tensors[change.site.weight.name]
        dtype = change.dtype
        if "kept" in field:
            info = change.site.laid(change.site.weight)._replace(dtype=dtype)
            if field["kept"][1] != info.nbytes:
                raise FormatError(f"{printable(self.folder)}: {RECORD} is damaged at {printable(info.name)}")
            return Undo(dtype, kept=partial(self._kept, field, info))
        if "streams" not in field:
            raise FormatError(f"{printable(self.folder)}: record.json tells nothing of how to bring back a tensor")
        streams = {int(bits): bytes(self._read(field["file"], span)) for bits, span in field["streams"].items()}
        return Undo(dtype, streams=streams)

    def _kept(self, field: Mapping[str, Any], info: TensorInfo, rows: slice) -> Tensor:
        """Rows of a tensor that is in the record as it was."""
        part, skipped = info.part(rows)
        data = self._read(field["file"], [field["kept"][0] + skipped, part.nbytes])
        return tensor_from(data, info.torch_dtype, part.shape)

    def _sums(self, field: Mapping[str, Any], layer: str, info: TensorInfo, op: Op | None) -> Tensor | None:
        """What a layer has to know of the weight as it was, if it asks for that."""
        span = field.get("sums", {}).get(layer)
        if span is None or op is None:
            return None
        count = op.shape(info.shape)[0]
        if span[1] != 8 * count:
            raise FormatError(f"{printable(self.folder)}: {RECORD} is damaged at {printable(info.name)}")
        return tensor_from(self._read(field["file"], span), torch.float64, (count,))

    def _read(self, name: str, span: list[int]) -> bytearray:
        at, size = span
        return read_span(self.folder / name, at, size, "an undo record")


def _check_span(file: Path, at: object, size: object) -> None:
    """ValueError unless these bytes lie in the file."""
    there = file.stat().st_size if file.is_file() else 0
    if not (type(at) is int and type(size) is int and 0 <= at <= at + size <= there):
        raise ValueError(f"no bytes {at}, {size} in {file.name}")
