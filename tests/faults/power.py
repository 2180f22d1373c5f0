"""Power: what a disk may hold after the power failed at some call, by no more than POSIX says.

The bytes of a file are certain only after its own fsync: until then each write may be there, be torn, or be
missing, with zeros in its place where the file is longer. A name is certain only after an fsync of its folder:
until then each creation, renaming and removal in it may be there or not, each by itself and in any order. Real
file systems keep more. A renaming is whole: it never leaves both names or none.
"""

import pickle
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from random import Random
from typing import Any

Call = tuple[Any, ...]  # the name of a function of io/disk.py, and what it was given
Found = dict[str, Any]  # by name: bytes of a file, or what is in a folder


@dataclass(eq=False)
class File:
    """`changes` are writes (offset, bytes) and allocations (size, None); the first `certain` of them are there."""

    changes: list[tuple[int, bytes | None]] = field(default_factory=list)
    certain: int = 0
    size: int = 0  # written so far

    def survivor(self, draw: Random, luck: float) -> bytes:
        """The bytes after a failure."""
        data = bytearray()
        for index, (at, change) in enumerate(self.changes):
            kept = index < self.certain or draw.random() < luck
            if not kept and (change is None or draw.random() < 0.5):
                continue
            there = (change or b"")[: None if kept else draw.randrange(len(change or b"-"))]  # or torn
            data.extend(bytes(max(0, at + len(there) - len(data))))
            data[at : at + len(there)] = there
        return bytes(data)


@dataclass(eq=False)
class Folder:
    """`changes` give names to files and folders, or take them (None); the first `certain` of them are there."""

    changes: list[dict[str, "File | Folder | None"]] = field(default_factory=list)
    certain: int = 0

    def now(self) -> dict[str, "File | Folder"]:
        return _applied(self.changes)

    def survivor(self, draw: Random, luck: float) -> Found:
        """What is in the folder after a failure."""
        kept = [one for index, one in enumerate(self.changes) if index < self.certain or draw.random() < luck]
        return {name: node.survivor(draw, luck) for name, node in _applied(kept).items()}


class Disk:
    """A folder at `root` that holds `found` for certain, and the calls that change it."""

    def __init__(self, root: Path, found: Mapping[str, Any]) -> None:
        self.root, self.top = root, _certain(found)

    def call(self, name: str, *given: Any) -> None:
        """One call; what lies outside the root, or was made by other calls, is not looked at."""
        getattr(self, f"_{name}")(*given)

    def survivors(self, draw: Random) -> Found:
        """One state that the disk may be in after a failure now: all, none or some of what is uncertain survive."""
        return self.top.survivor(draw, draw.choice((0.0, 0.1, 0.5, 0.9, 1.0)))

    def _make_folder(self, path: str) -> None:
        folder = self.top
        for part in self._parts(path):
            if part not in folder.now():
                folder.changes.append({part: Folder()})
            found = folder.now()[part]
            assert isinstance(found, Folder)
            folder = found

    def _create(self, path: str) -> None:
        self._named(path, File())

    def _allocate(self, path: str, size: int) -> None:
        found = self._at(path)
        if isinstance(found, File) and size:
            found.changes.append((size, None))

    def _write(self, path: str, data: bytes) -> None:
        found = self._at(path)
        assert isinstance(found, File)
        found.changes.append((found.size, data))
        found.size += len(data)

    def _begin_sync(self, path: str) -> None:
        """Nothing is certain by it."""

    def _sync(self, path: str) -> None:
        found = self._at(path)
        if found is not None:
            found.certain = len(found.changes)

    def _rename(self, old: str, new: str) -> None:
        found = self._at(old)
        assert found is not None
        self._change(old, {PurePosixPath(old).name: None, PurePosixPath(new).name: found})

    _place = _rename

    def _exchange(self, one: str, other: str) -> None:
        here, there = self._at(one), self._at(other)
        self._change(one, {PurePosixPath(one).name: there, PurePosixPath(other).name: here})

    def _remove(self, path: str) -> None:
        if self._at(path) is not None:  # the lock is made by calls of its own
            self._named(path, None)

    _remove_folder = _remove

    def _named(self, path: str, node: File | Folder | None) -> None:
        self._change(path, {PurePosixPath(path).name: node})

    def _change(self, path: str, change: dict[str, File | Folder | None]) -> None:
        folder = self._at(str(PurePosixPath(path).parent))
        assert isinstance(folder, Folder), path
        folder.changes.append(change)

    def _at(self, path: str) -> File | Folder | None:
        found: File | Folder | None = self.top
        for part in self._parts(path):
            found = found.now().get(part) if isinstance(found, Folder) else None
        return found

    def _parts(self, path: str) -> tuple[str, ...]:
        return PurePosixPath(path).relative_to(PurePosixPath(self.root)).parts


def read_trace(path: Path) -> Iterator[Call]:
    """The calls that children have made, in their order."""
    with path.open("rb") as file:
        while True:
            try:
                yield pickle.load(file)
            except EOFError:
                return


def nested(files: Mapping[str, bytes]) -> Found:
    """Files by path, as folders in folders."""
    found: Found = {}
    for name, data in files.items():
        *folders, last = name.split("/")
        place = found
        for one in folders:
            place = place.setdefault(one, {})
        place[last] = data
    return found


def flat(found: Mapping[str, Any]) -> dict[str, bytes]:
    """The files of folders in folders, by path."""
    files: dict[str, bytes] = {}
    for name, one in found.items():
        files |= (
            {name: one} if isinstance(one, bytes) else {f"{name}/{inner}": data for inner, data in flat(one).items()}
        )
    return files


def lay_folders(found: Mapping[str, Any], folder: Path) -> None:
    """Write it all, empty folders too."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, one in found.items():
        if isinstance(one, bytes):
            (folder / name).write_bytes(one)
        else:
            lay_folders(one, folder / name)


def _applied(changes: Iterable[Mapping[str, File | Folder | None]]) -> dict[str, File | Folder]:
    names: dict[str, File | Folder | None] = {}
    for change in changes:
        names |= change
    return {name: node for name, node in names.items() if node is not None}


def _certain(found: Mapping[str, Any]) -> Folder:
    nodes = {name: File([(0, one)], 1) if isinstance(one, bytes) else _certain(one) for name, one in found.items()}
    return Folder([dict(nodes)], 1)
