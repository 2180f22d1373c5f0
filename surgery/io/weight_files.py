"""WeightFiles: which files of a folder hold a model's weights: one, or the shards that an index names."""

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from surgery.errors import FormatError, InputError, printable
from surgery.io.misplaced import folder_in_words, refuse_other
from surgery.io.regular import contained
from surgery.io.strict_json import parse_json, read_bytes

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
_SHARD = re.compile(r"(.*-)\d{5}-of-(\d{5})\.safetensors")


@dataclass(frozen=True)
class WeightFiles:
    """Their names, and the index that says which tensor is in which, if there is one."""

    folder: Path
    names: Sequence[str]
    index: dict[str, Any] | None = None
    index_bytes: bytes = b""

    @classmethod
    def at(cls, path: Path) -> "WeightFiles":
        """Those of a folder, or the one file that `path` is.

        Raises InputError where there is none or it is not clear which, FormatError for an index that is damaged.
        """
        if path.is_file():
            refuse_other(path)
            return cls(path.parent, [path.name])
        folder = path if path.is_dir() else path.parent
        if os.path.lexists(folder / INDEX):
            return cls._indexed(folder)
        if os.path.lexists(folder / SINGLE):
            return cls(folder, [SINGLE])
        found = sorted(file.name for file in folder.glob("*.safetensors"))
        if len(found) == 1:
            return cls(folder, found)
        raise InputError(f"{printable(folder)}: {_what_lies_there(folder, found)}")

    @classmethod
    def _indexed(cls, folder: Path) -> "WeightFiles":
        if os.path.lexists(folder / SINGLE):
            raise FormatError(
                f"{printable(folder)}: both {SINGLE} and {INDEX}, and loaders take the one or the other; "
                "one model is wanted; move the other away"
            )
        where, raw = printable(folder / INDEX), read_bytes(contained(folder, INDEX))
        index = parse_json(raw, where)
        if not isinstance(index.get("metadata") or {}, dict):
            raise FormatError(f"{where}: its metadata is no table; the index is damaged")
        names = sorted(set(_shard_names(index, where)))
        _check_complete(names, where)
        return cls(folder, names, index, raw)

    def check(self, here: Mapping[str, str]) -> None:
        """FormatError unless the index, if there is one, has each tensor in the file that it is in."""
        told: Mapping[str, str] = here if self.index is None else self.index["weight_map"]
        for name in sorted(told.keys() | here.keys()):
            if told.get(name) != here.get(name):
                raise FormatError(
                    f"{printable(self.folder / INDEX)}: {printable(name)} should be in {printable(told.get(name))}, "
                    f"and is in {printable(here.get(name))}; index and shards must agree; copy the checkpoint again"
                )


def _shard_names(index: Mapping[str, Any], where: str) -> Iterator[str]:
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise FormatError(f"{where}: it has no weight_map; the index is damaged")
    for name in weight_map.values():
        plain = isinstance(name, str) and not {"/", "\\"} & set(name) and name.isprintable()
        if not plain or not name.endswith(".safetensors"):
            raise FormatError(f"{where}: {printable(name)!r} is no shard's name; a .safetensors file is wanted")
        yield name


def _check_complete(names: list[str], where: str) -> None:
    """A shard's name tells how many there are; each holds tensors, and so the index names each."""
    for prefix, count in {(found[1], found[2]) for name in names if (found := _SHARD.fullmatch(name))}:
        of_these = [name for name in names if name.startswith(prefix) and name.endswith(f"-of-{count}.safetensors")]
        if len(of_these) != int(count):
            raise FormatError(
                f"{where}: it names {len(of_these)} of {int(count)} shards; all are wanted; copy the checkpoint again"
            )


def _what_lies_there(folder: Path, found: list[str]) -> str:
    if found:
        return f"{len(found)} safetensors files and no {INDEX}; name one of the files"
    return folder_in_words(folder)
