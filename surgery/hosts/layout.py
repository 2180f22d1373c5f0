"""Layout: which tensors stand in which file of an output, in what order, and the headers and index that say so."""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from surgery.core.site import TensorInfo
from surgery.errors import UsageError, quoted
from surgery.hosts.checkpoint import Checkpoint
from surgery.io.header import encode_header, parse_header
from surgery.io.strict_json import json_bytes
from surgery.io.tensor_file import TensorFile
from surgery.io.weight_files import SINGLE

_SIZE = re.compile(r"(\d{1,15}(?:\.\d{1,9})?)\s*((?:[KMGT]i?)?B?)", re.IGNORECASE)
_BLOCK = 4096  # bytes of a disk's block; a bare number below lacks its unit
_UNITS = {"": 1, "B": 1}
_UNITS |= {f"{unit}{end}": 1000 ** (i + 1) for i, unit in enumerate("KMGT") for end in ("", "B")}
_UNITS |= {f"{unit}I{end}": 1024 ** (i + 1) for i, unit in enumerate("KMGT") for end in ("", "B")}


@dataclass(frozen=True)
class OutFile:
    """A file to write: its header's bytes, and its tensors in the order of theirs."""

    name: str
    raw: bytes
    infos: tuple[TensorInfo, ...]

    @cached_property
    def size(self) -> int:
        """In bytes."""
        return len(self.raw) + sum(info.nbytes for info in self.infos)


@dataclass(frozen=True)
class Layout:
    """The files of an output, and its index if it has one."""

    files: tuple[OutFile, ...]
    index: bytes | None = None

    @property
    def size(self) -> int:
        """In bytes."""
        return sum(file.size for file in self.files) + len(self.index or b"")

    def infos(self) -> Iterator[TensorInfo]:
        """All tensors, in the order of the files."""
        for file in self.files:
            yield from file.infos


Together = Sequence[TensorInfo]  # the tensors of one weight, which stand in one file, one after another


def layout_like(
    base: Checkpoint, written: Mapping[str, Together], told: Mapping[str, str], max_shard_bytes: int | None = None
) -> Layout:
    """The base's files, with the weights of `written` as they stand there; those the base lacks come last.

    Each header that is another says `told` too: of weights in all files, for loaders take one for all.
    One that several tensors of the base hold together stands in the place of their first; the others are gone.
    With `max_shard_bytes` the weights go, in the same order, into new files of at most that size; one that is larger
    has a file for itself.
    """
    packed = {name: infos for name, infos in written.items() if name in base.packed}
    gone: dict[str, Together] = {held: () for name in packed for held in base.holding(name)}
    firsts = {base.packed[name].first.name: infos for name, infos in packed.items()}
    placed = {**written, **gone, **firsts}
    standing = [list(_standing(file, placed)) for file in base.files]
    standing[-1] += [infos for name, infos in written.items() if base.info(name) is None]
    if max_shard_bytes is not None:
        standing = list(_packed((one for group in standing for one in group), max_shard_bytes))
    grouped = [[info for one in group for info in one] for group in standing]
    emptied = any(file.header.entries and not group for file, group in zip(base.files, grouped, strict=False))
    if max_shard_bytes is None and not emptied:
        names = [base.written_name(file) for file in base.files]
    else:
        grouped = [group for group in grouped if group] or [[]]
        count = len(grouped)
        names = [f"model-{i + 1:05}-of-{count:05}.safetensors" for i in range(count)] if count > 1 else [SINGLE]
    files = tuple(_file(base, name, infos, told) for name, infos in zip(names, grouped, strict=True))
    return Layout(files, _index(base, files))


def layout_of(headers: Mapping[str, bytes], sizes: Mapping[str, int]) -> Layout:
    """Files of given headers, whose sizes are told apart. FormatError for a header that is none."""
    files = []
    for name, raw in headers.items():
        infos = tuple(entry.info for entry in parse_header(raw, sizes[name], name).entries)
        files.append(OutFile(name, raw, infos))
    return Layout(tuple(files))


def bytes_of(size: int | str | None, option: str) -> int | None:
    """What an option gives in bytes: a whole number, or with a unit, as "5GB" or "512MiB". UsageError for another."""
    if size is None:
        return None
    found = _SIZE.fullmatch(str(size).strip())
    count = int(float(found[1]) * _UNITS[found[2].upper()]) if found else 0
    if count < 1:
        raise UsageError(f"`{option}` is {quoted(size)}; a number of bytes is wanted; say it such as 5GB")
    if found and not found[2] and count < _BLOCK:
        raise UsageError(f"`{option}` is {quoted(size)}, which is of bytes; say it with its unit, such as {count}GB")
    return count


def _standing(file: TensorFile, placed: Mapping[str, Together]) -> Iterator[Together]:
    """What stands in a file now: in a tensor's place what is placed there, which may be nothing."""
    for entry in file.header.entries:
        infos = placed.get(entry.info.name, (entry.info,))
        if infos:
            yield infos


def _packed(weights: Iterable[Together], max_shard_bytes: int) -> Iterator[list[Together]]:
    group: list[Together] = []
    size = 0
    for infos in weights:
        nbytes = sum(info.nbytes for info in infos)
        if group and size + nbytes > max_shard_bytes:
            yield group
            group, size = [], 0
        group.append(infos)
        size += nbytes
    yield group


def _file(base: Checkpoint, name: str, infos: Sequence[TensorInfo], told: Mapping[str, str]) -> OutFile:
    """With the base's own header where that says the same, and nothing of weights that `told` speaks of."""
    for file in base.files:
        same = base.written_name(file) == name and [entry.info for entry in file.header.entries] == list(infos)
        if same and not (told and _NAMES in file.header.metadata):
            return OutFile(name, file.header.raw, tuple(infos))
    like = next((file for file in base.files if base.written_name(file) == name), base.files[0])
    return OutFile(name, encode_header(infos, _told(base, like.header.metadata, infos, told)), tuple(infos))


def _told(
    base: Checkpoint, metadata: Mapping[str, str], infos: Sequence[TensorInfo], told: Mapping[str, str]
) -> Mapping[str, str]:
    """The metadata; without what torchao tells there of each tensor, where some are plain now, or `told` otherwise."""
    if not told and not any(info.name in base.packed and info.name in metadata for info in infos):
        return metadata
    names = {info.name for info in base.weights()} | {_NAMES}
    return {**{key: value for key, value in metadata.items() if key not in names}, **told}


_NAMES = "tensor_names"  # under which torchao lists the tensors that the metadata speaks of


def _index(base: Checkpoint, files: Sequence[OutFile]) -> bytes | None:
    """With the base's own bytes where they say the same; None for a single file that had none."""
    if base.index is None and len(files) == 1:
        return None
    weight_map = {info.name: file.name for file in files for info in file.infos}
    told = base.index or {}
    metadata = dict(told.get("metadata") or {})
    size = sum(info.nbytes for file in files for info in file.infos)
    same_size = size == sum(info.nbytes for info in base.tensors())
    if base.index is not None and told["weight_map"] == weight_map and same_size:
        return base.index_bytes
    if len(files) == 1 and files[0].name == SINGLE:
        return None
    return json_bytes({**told, "metadata": {**metadata, "total_size": size}, "weight_map": weight_map})
