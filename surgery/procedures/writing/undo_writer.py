"""UndoWriter: what a reversible merge records of each weight while it is merged. See undo_record for its files."""

import base64
import hashlib
from collections.abc import Collection, Iterable, Mapping, Sequence
from contextlib import ExitStack
from types import TracebackType
from typing import Any

from torch import Tensor

from surgery.adapters import out_proj
from surgery.adapters.peft import adapter_bytes, config_bytes
from surgery.core.adapter import Adapter, Layer, Weighted
from surgery.core.site import TensorInfo
from surgery.core.undo import Recorder
from surgery.hosts.change import Change, MergedTile
from surgery.hosts.checkpoint import Checkpoint
from surgery.hosts.layout import Layout
from surgery.io.octets import octets
from surgery.io.staged_file import StagedFile
from surgery.io.staging import Staging
from surgery.io.strict_json import json_bytes
from surgery.procedures.writing.undo_record import FOLDER, FORMAT, RECORD


class UndoWriter:
    """A watch of a merge, whose files may be merged at once. Use as a context; `finish` writes the record."""

    def __init__(self, base: Checkpoint, staging: Staging, layout: Layout) -> None:
        self.base, self.staging = base, staging
        self.files = {file.name: FileUndo(base, staging, f"streams-{i}") for i, file in enumerate(layout.files)}
        self.file_of = {info.name: file.name for file in layout.files for info in file.infos}

    def __enter__(self) -> "UndoWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        for file in self.files.values():
            file.context.__exit__(kind, value, trace)

    def __call__(self, tile: MergedTile) -> None:
        self.files[self.file_of[tile.change.site.written]](tile)

    def least_bytes(self, changes: Iterable[Change], adapters: Iterable[Weighted], parts: Collection[str]) -> int:
        """What the record takes at least where these files are still to be written; of its streams nothing is known."""
        kept = [one for one in changes if _is_kept(one) and self.file_of[one.site.written] in parts]
        tensors = [name for one in kept for name in _held_in(self.base, one)]
        copies = sum(sum(adapter.site_bytes()) + adapter.shared_bytes() for adapter, _ in adapters)
        return copies + sum(self.base.at[name][1].info.nbytes for name in tensors)

    def close(self, part: str) -> "FileUndo":
        """What was recorded of one file, its streams on the disk."""
        self.files[part].context.close()
        return self.files[part]

    def finish(self, adapters: Sequence[Weighted], files: Mapping[str, str], displaced: Sequence[str]) -> str:
        """sha256 of the record. `files`: the originals' by name, but for `displaced`, whose bytes the merge changes."""
        kept = {name: self.staging.carry(self.base.folder / name, f"{FOLDER}/files/{name}") for name in displaced}
        for index, (adapter, _) in enumerate(adapters):
            held, config = (
                adapter_bytes(_spelled(adapter), shared=adapter.config.shared),
                adapter.config.keeping_shared(),
            )
            self.staging.write(f"{FOLDER}/adapter-{index}.tensors", held)
            self.staging.write(f"{FOLDER}/adapter-{index}.json", config_bytes(config))
        named = [(self.base.written_name(file), file) for file in self.base.files]
        record = {
            "format": FORMAT,
            "weights": [weight.hex() for _, weight in adapters],
            "files": {**files, **kept},
            "displaced": sorted(displaced),
            "headers": {name: base64.b64encode(file.header.raw).decode() for name, file in named},
            "sizes": {name: file.state.st_size for name, file in named},
            "streams_sha256": {one.name: one.sha256 for one in self.files.values() if one.tensors},
            "tensors": {name: field for one in self.files.values() for name, field in one.tensors.items()},
        }
        return self.staging.write(f"{FOLDER}/{RECORD}", json_bytes(record))


class FileUndo:
    """What the merge of one file needs to be undone: its index streams, in a file of their own."""

    def __init__(self, base: Checkpoint, staging: Staging, name: str) -> None:
        self.base, self.staging, self.name = base, staging, name
        self.tensors: dict[str, dict[str, Any]] = {}
        self.recorder: Recorder | None = Recorder()
        self.at, self.hash = 0, hashlib.sha256()
        self.sha256 = self.hash.hexdigest()  # of no bytes, where every weight can be recomputed
        self.context = ExitStack()
        self.file: StagedFile | None = None

    def __call__(self, tile: MergedTile) -> None:
        if tile.steps is None or tile.original is None or _is_kept(tile.change):
            self.recorder = None
        elif self.recorder is not None:
            self.recorder.add(tile.original, tile.merged, tile.steps, tile.near_ties)
        if tile.last:
            if _held_in(self.base, tile.change):
                self._end(tile.change)
            self.recorder = Recorder()

    def told(self) -> dict[str, Any]:
        """What a later run has to know of it."""
        return {"sha256": self.sha256, "tensors": self.tensors}

    def take(self, told: Mapping[str, Any]) -> None:
        """It was recorded by an earlier run."""
        self.sha256, self.tensors = told["sha256"], told["tensors"]

    def _end(self, change: Change) -> None:
        """Write the streams of a tensor, or the tensor where that is smaller or they do not fit, or it is packed."""
        name = change.site.weight.name
        streams = self.recorder.streams() if self.recorder is not None and self.recorder.exact else None
        if self.file is None:
            self.file = self.context.enter_context(self.staging.file(f"{FOLDER}/{self.name}"))
        size = self.base.at[name][1].info.nbytes if name in self.base.at else 0
        if streams is None or sum(map(len, streams.values())) >= size:
            for one in _held_in(self.base, change):
                self._keep(self.file, self.base.at[one][1].info)
        else:
            field: dict[str, Any] = {"file": self.name}
            field["op"] = None if change.site.op is None else change.site.op.name
            field["layers"] = [[layer.adapter, layer.name] for layer in change.layers]
            field["streams"] = {}
            for bits, data in streams.items():
                field["streams"][str(bits)] = [self.at, len(data)]
                self._write(self.file, memoryview(data))
            for index, sums in _sums(change.layers):
                field.setdefault("sums", {})[str(index)] = [self.at, sums.nbytes]
                self._write(self.file, octets(sums))
            self.tensors[name] = field

    def _keep(self, file: StagedFile, info: TensorInfo) -> None:
        """A tensor of the base as it is."""
        self.tensors[info.name] = {"file": self.name, "kept": [self.at, info.nbytes]}
        for chunk in self.base.read(info.name):
            self._write(file, chunk)

    def _write(self, file: StagedFile, data: memoryview) -> None:
        self.hash.update(data)
        self.sha256 = self.hash.hexdigest()
        self.at += len(data)
        file.write(data)


def _is_kept(change: Change) -> bool:
    """Can nothing but the original bring it back? More are found so while they are merged.

    The sums that a bias depends on, of the weight beside it, take more than the bias.
    """
    others = (change.saved, change.as_peft, change.beside)
    return bool(change.held or change.through or change.mixes) or any(one is not None for one in others)


def _held_in(base: Checkpoint, change: Change) -> Sequence[str]:
    """Those of the base that hold what is changed; none where it is new."""
    name = change.site.weight.name
    if base.info(name) is None:
        return ()
    return [change.site.written] if change.keep else base.holding(name)


def _sums(layers: Sequence[Layer]) -> list[tuple[int, Tensor]]:
    """By the position of the layer, of those that ask for them."""
    return [(index, layer.sums.cpu()) for index, layer in enumerate(layers) if layer.sums is not None]


def _spelled(adapter: Adapter) -> dict[str, Tensor]:
    """The tensors of its sites, as PEFT ends their names, and those that these share."""
    found = adapter.named_shared()
    spelled = {(one.role, one.op): ending for ending, one in adapter.config.endings().items()}
    for site, params in adapter.sites.items():
        for role in params.keys() - adapter.shared:
            ending = spelled.get((role, adapter.ops.get(site))) or spelled[role, None]
            found[f"{site}.{ending}"] = out_proj.written(site, role, params[role])
    return found
