"""Checkpoint: a folder of safetensors, or one file, as a readable place of sites."""

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

from torch import Tensor

from surgery.core.codec import Packed
from surgery.core.linears import Linears
from surgery.core.name_map import USUAL, NameMap
from surgery.core.site import CODES, Site, TensorInfo
from surgery.errors import FormatError, printable
from surgery.hosts.packed_stacks import PackedStacks
from surgery.hosts.packing import Held, packings, torch_dtype_of
from surgery.hosts.reading import Reading
from surgery.io.header import Entry
from surgery.io.octets import tensor_from
from surgery.io.open_files import OpenFiles
from surgery.io.regular import contained
from surgery.io.strict_json import read_json
from surgery.io.tensor_file import TensorFile
from surgery.io.weight_files import SINGLE, WeightFiles

_SHARED, _SHARED_BYTES = 64, 1 << 14  # tensors that stay in memory, and how large one may be


class Checkpoint(OpenFiles):
    """Its files are open for reading; close it, or use it as a context.

    Raises InputError if nothing can be read at `path`, FormatError if its files contradict each other.
    """

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.path = path
        self.folder = path if path.is_dir() else path.parent
        self.config = self._config()
        weights = WeightFiles.at(path)
        self.index, self.index_bytes = weights.index, weights.index_bytes
        try:
            for name in weights.names:
                # A file that the user names may be a link to anywhere.
                self.files.append(TensorFile(contained(self.folder, name) if path.is_dir() else path))
            self.at = self._positions(weights)
        except BaseException:
            self.close()
            raise
        self.readings: list[Reading] | None = None
        self._shared = lru_cache(_SHARED)(lambda info: self._rows_of(info, None))
        self.hub_id: str | None = None  # the repository of the Hub that it came from, and the commit
        self.commit: str | None = None
        self.names: Callable[[], NameMap] = lambda: USUAL  # of the model in memory, asked for where they matter
        self.in_memory: Callable[[], Mapping[str, str]] = dict  # of what is called otherwise there, the files' names
        self.ties: Callable[[], Mapping[str, str]] = dict  # the same, of what is tied to another there, that one
        self.linears: Callable[[], Linears | None] = lambda: None  # the same; None where nothing tells

    def called(self) -> Callable[[str], str]:
        """What the model in memory calls a tensor of the files, stacks aside."""
        usual, told = self.names().rename, {there: name for name, there in self.in_memory().items()}
        return lambda name: told.get(name) or usual(name)

    def hash_reads(self, ahead: int = 0) -> list[Reading]:
        """From now on all that is read is hashed, by file, if `ahead` is given up to so many pieces later."""
        self._shared.cache_clear()
        self.readings = [Reading(file, ahead) for file in self.files]
        return self.readings

    def tensors(self) -> Iterator[TensorInfo]:
        """All tensors, in the order of the files and of the bytes in each."""
        for file in self.files:
            for entry in file.header.entries:
                yield entry.info

    @cached_property
    def packed(self) -> Mapping[str, Held]:
        """The weights that are not held plainly, by the name of the plain tensor; its dtype is to compute with."""
        return packings(self.tensors(), self.config, self._rows_of)

    @cached_property
    def stacks(self) -> PackedStacks:
        """Those of `packed` that hold a matrix for each expert, as they are decoded."""
        return PackedStacks(self._rows_of)

    def holding(self, name: str) -> Sequence[str]:
        """The tensors of the files that hold a weight; its own for one that is plain."""
        return [one.name for one in self.packed[name].tensors.values()] if name in self.packed else [name]

    def weights(self) -> Iterator[TensorInfo]:
        """All tensors as a plain checkpoint would list them: what holds a weight together is one."""
        packed = {name for plain in self.packed for name in self.holding(plain)}
        standing = {held.first.name: held.plain for held in self.packed.values()}
        for info in self.tensors():
            one = standing.get(info.name) or (None if info.name in packed else info)
            if one is not None:
                yield one

    def info(self, name: str) -> TensorInfo | None:
        """Of one of `weights`; None if it is not there."""
        if name in self.packed:
            return self.packed[name].plain
        return self.at[name][1].info if name in self.at else None

    def sites(self) -> Iterable[Site]:
        """Weights grouped by module path: the last part of a name is the role."""
        grouped: dict[str, dict[str, TensorInfo]] = {}
        for info in self.weights():
            path, _, role = info.name.rpartition(".")
            grouped.setdefault(path, {})[role] = info
        return [Site(path, roles) for path, roles in grouped.items()]

    def load(self, site: Site, rows: slice | None = None) -> Packed:
        """The weight, or `rows` of its first axis, as the files hold it."""
        held = self.packed.get(site.weight.name)
        if held is not None and site.op is not None and site.op.stack and CODES in site.tensors:
            return held.by_output().load(rows, self._part_of)
        if held is not None and site.op is not None and site.op.stack:
            return Packed({"weight": self.stacks.rows(site, held, rows)})
        if held is not None:
            return held.load(rows, self._rows_of if rows is None else self._part_of)
        info = site.laid(self.at[site.weight.name][1].info)
        _ = info.torch_dtype  # a format that torch lacks is refused
        return Packed({"weight": self._rows_of(info, rows)})

    def written_name(self, file: TensorFile) -> str:
        """What a copy of one of its files is called: a base given as one file becomes a model folder."""
        return file.path.name if self.path.is_dir() else SINGLE

    def file_of(self, name: str) -> int:
        """The file that holds a tensor, as an index into `files`."""
        return self.at[name][0]

    def read(self, name: str) -> Iterator[memoryview]:
        """The bytes of a tensor, in chunks."""
        index, entry = self.at[name]
        start = entry.start
        for chunk in self.files[index].chunks(entry):
            if self.readings is not None:
                self.readings[index].feed(entry, start, chunk)
            start += len(chunk)
            yield chunk

    def _rows_of(self, info: TensorInfo, rows: slice | None) -> Tensor:
        """A tensor of the files, or `rows` of its first axis."""
        index, entry = self.at[info.name]
        part, skipped = (info, 0) if rows is None else info.part(rows)
        data = self.files[index].read(entry.start + skipped, part.nbytes)
        if self.readings is not None:
            self.readings[index].feed(entry, entry.start + skipped, data)
        return tensor_from(data, torch_dtype_of(info), part.shape)

    def _part_of(self, info: TensorInfo, rows: slice | None) -> Tensor:
        """The same for a tile. What all tiles of a weight share, such as a table of values, is read once."""
        if rows is not None or info.nbytes > _SHARED_BYTES:
            return self._rows_of(info, rows)
        return self._shared(info)

    def _config(self) -> dict[str, Any]:
        if not os.path.lexists(self.folder / "config.json"):
            return {}
        config = read_json(contained(self.folder, "config.json"))
        _check_config(config, printable(self.folder / "config.json"))
        return config

    def _positions(self, weights: WeightFiles) -> Mapping[str, tuple[int, Entry]]:
        found: dict[str, tuple[int, Entry]] = {}
        for index, file in enumerate(self.files):
            for name, entry in file.entries.items():
                if name in found:
                    other = self.files[found[name][0]].path.name
                    raise FormatError(f"{file.where}: {printable(name)} stands in {other} too; each may stand once")
                found[name] = index, entry
        weights.check({name: self.files[index].path.name for name, (index, _) in found.items()})
        return found


def _check_config(config: Mapping[str, Any], where: str) -> None:
    """FormatError where a field that tells how weights are meant is not of its type."""
    model_type, architectures = config.get("model_type"), config.get("architectures")
    if not isinstance(model_type, str | None):
        raise FormatError(f"{where}: model_type is {printable(model_type)}; a string is wanted; was it edited?")
    listed = architectures if isinstance(architectures, list | None) else [None]
    if not all(isinstance(one, str) for one in listed or ()):
        raise FormatError(f"{where}: architectures is {printable(architectures)}; a list of strings is wanted")
