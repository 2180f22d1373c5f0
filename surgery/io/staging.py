"""Staging: an output folder that appears whole, by one rename, or not at all, and can be gone on with if cut short.

Beside `out` lie, while it is written: `.out.surgery-lock`, which holds off other runs, and
`.out.surgery-staging`, whose files bear their names only once they are whole and on the disk, and whose
journal tells which parts are finished.
"""

import hashlib
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from surgery.errors import EnvironmentFault, InputError, StateError, printable
from surgery.io import disk
from surgery.io.durable import PARTIAL, faults, make_folder, remove_all, sync_folder
from surgery.io.journal import NAME as JOURNAL
from surgery.io.journal import Journal
from surgery.io.lock import Lock
from surgery.io.place import Place
from surgery.io.regular import contained, file_sha256, read_pieces
from surgery.io.staged_file import StagedFile

_FAULTS = (EnvironmentFault, OSError, MemoryError, RuntimeError)  # after these a run can go on, as when interrupted


class Staging:
    """A hidden folder beside `out`; as a context it becomes `out` on success and is removed on failure.

    `key` stands for all that decides the output's bytes. After an interruption or a fault of the environment
    the folder stays, and a run of the same key goes on with its `finished` parts. `resume` false starts anew;
    true asks for a folder to go on with, else StateError. OutputExistsError if `out` exists and `overwrite` is
    false, or if another run is writing it.
    """

    def __init__(self, out: Path, *, overwrite: bool = False, key: str = "", resume: bool | None = None) -> None:
        self.place = Place(out)
        self.out, self.folder = self.place.out, self.place.folder
        self.overwrite, self.key, self.resume = overwrite, key, resume
        self.journal = Journal(self.folder, key)

    def __enter__(self) -> Self:
        self.place.refuse_taken(self.overwrite)
        with faults(self.out):
            make_folder(self.out.parent)
            self.lock = Lock(self.out)
        try:
            with faults(self.out):
                self.place.mend()
                self.place.refuse_taken(self.overwrite)  # anew: a run that held the lock may have just written it
                self._begin()
        except BaseException:
            self.journal.close()
            self.lock.release()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                with faults(self.out):
                    self.journal.close()
                    self.place.take(self.journal.path)
            elif not self.finished or not _goes_on(kind):
                remove_all(self.folder)
            elif value is not None:
                value.add_note(f"what is finished lies in {printable(self.folder)}; the same call goes on from there")
        finally:
            self.journal.close()
            self.lock.release()

    @property
    def finished(self) -> Mapping[str, tuple[Mapping[str, str], Any]]:
        """By finished part: its files with their sha256, and what was told of it."""
        return {part: (one["files"], one["told"]) for part, one in self.journal.done.items()}

    def forget(self, part: str) -> None:
        """A finished part is of no use after all."""
        with faults(self.out):
            for name in self.journal.done.pop(part)["files"]:
                disk.remove(self.folder / name)

    def finish(self, part: str, files: Mapping[str, str], told: Any) -> None:
        """A part is done: its `files` by name, with their sha256, and what a later run has to know of it."""
        with faults(self.out):
            self.journal.add(part, {"files": dict(files), "told": told})

    def require_room(self, needed_bytes: int) -> None:
        """EnvironmentFault unless the disk has as many bytes free."""
        with faults(self.out):
            free = shutil.disk_usage(self.folder).free
        if free < needed_bytes:
            raise EnvironmentFault(
                f"{printable(self.out)}: {needed_bytes:,} bytes are needed, {free:,} are free; "
                "make room, or write to another disk"
            )

    @contextmanager
    def file(self, name: str, size: int = 0) -> Iterator[StagedFile]:
        """A file of the folder, of `size` bytes if known; it bears its name only once it is whole and on the disk."""
        path = self.folder / name
        partial = path.with_name(path.name + PARTIAL)
        with faults(self.out):
            disk.make_folder(path.parent)
            descriptor = disk.create(partial)
            try:
                disk.allocate(descriptor, size)
                yield StagedFile(descriptor, self.out)
                disk.sync(descriptor)
            finally:
                os.close(descriptor)
            disk.rename(partial, path)

    def write(self, name: str, data: bytes) -> str:
        """A small file; returns its sha256."""
        with self.file(name) as file:
            file.write(data)
        return hashlib.sha256(data).hexdigest()

    def carry(self, source: Path, name: str) -> str:
        """A copy of `source` under `name`; returns the sha256 of the bytes written."""
        sha256 = hashlib.sha256()
        with self.file(name) as file:
            for data in read_pieces(source, "a file to carry"):
                sha256.update(data)
                file.write(data)
        return sha256.hexdigest()

    def put(self, name: str, content: bytes | Path) -> str:
        """A small file of these bytes, or a copy of that one; returns its sha256."""
        return self.write(name, content) if isinstance(content, bytes) else self.carry(content, name)

    def adopt(self) -> None:
        """What another library has written into the folder is brought to the disk, as readable as files of ours."""
        with faults(self.out):
            mode = self.journal.path.stat().st_mode
            for path in self.folder.rglob("*"):
                if path.is_file():
                    path.chmod(mode)
                    with path.open("rb") as file:
                        disk.sync(file.fileno())

    def _begin(self) -> None:
        """An empty folder, or one that holds finished parts and nothing else; with an open journal."""
        resumable = bool(self.key) and self.resume is not False and self.journal.read()
        if self.folder.is_symlink() or not self.folder.is_dir():
            remove_all(self.folder)
        if resumable:
            self.journal.done = {part: one for part, one in self.journal.done.items() if self._whole(one)}
        if self.resume and not resumable:
            raise StateError(f"{printable(self.out)}: nothing to go on with; no run of this call was cut short here")
        try:
            self._tidy()
            self.journal.begin()
        except BaseException:
            if not self.finished:
                remove_all(self.folder)
            raise

    def _tidy(self) -> None:
        """Leave the files of the finished parts, and the journal."""
        kept = {name for one in self.journal.done.values() for name in one["files"]}
        disk.make_folder(self.folder)
        for path in sorted(self.folder.rglob("*"), reverse=True):  # what lies in a folder comes before it
            if path.is_dir() and not path.is_symlink():
                if not any(path.iterdir()):
                    disk.remove_folder(path)
            elif path.relative_to(self.folder).as_posix() not in kept | {JOURNAL}:
                disk.remove(path)
        sync_folder(self.folder)  # what another run has left is gone, before this one writes beside it

    def _whole(self, one: Any) -> bool:
        """Are the files of a finished part still those that were written?"""
        try:
            return all(file_sha256(contained(self.folder, name)) == wanted for name, wanted in one["files"].items())
        except (InputError, EnvironmentFault, KeyError, TypeError, AttributeError):
            return False


def _goes_on(kind: type[BaseException]) -> bool:
    """Can a run that ended so be gone on with: was it interrupted, or did the environment fail it?"""
    return not issubclass(kind, Exception) or (issubclass(kind, _FAULTS) and not issubclass(kind, InputError))
