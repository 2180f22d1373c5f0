"""Staging: an output folder that appears whole, by one rename, or not at all."""

import fcntl
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, Self

from surgery.errors import EnvironmentFault, OutputExistsError, printable
from surgery.io.regular import open_regular


class Staging:
    """A hidden folder beside `out`; as a context it is renamed to `out` on success and removed on failure.

    OutputExistsError if `out` exists and `overwrite` is false, or if another run is writing it.
    """

    def __init__(self, out: Path, overwrite: bool = False) -> None:
        self.out = Path.cwd() / out
        self.overwrite = overwrite
        self.folder = self.out.with_name(f".{self.out.name}.surgery-staging")
        self.lock = -1

    def __enter__(self) -> Self:
        if os.path.lexists(self.out) and not self.overwrite:
            raise OutputExistsError(f"{printable(self.out)}: it exists; a new folder is wanted; or say --overwrite")
        with _faults(self.out):
            self.out.parent.mkdir(parents=True, exist_ok=True)
            self.folder.mkdir(exist_ok=True)
            self.lock = os.open(self.folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(self.lock)
            raise OutputExistsError(f"{printable(self.out)}: another run is writing it; wait for that one") from error
        self._clear()  # what an interrupted run has left
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                with _faults(self.out):
                    self._publish()
        finally:
            shutil.rmtree(self.folder, ignore_errors=True)
            os.close(self.lock)

    @contextmanager
    def file(self, name: str) -> Iterator[BinaryIO]:
        """A file of the folder, which bears its name only once it is whole and on the disk."""
        path = self.folder / name
        partial = path.with_name(path.name + ".partial")
        with _faults(self.out):
            path.parent.mkdir(parents=True, exist_ok=True)
            with partial.open("xb", buffering=0) as raw:
                yield raw
                os.fsync(raw.fileno())
            partial.rename(path)

    def write(self, name: str, data: bytes) -> None:
        with self.file(name) as file:
            write_all(file, data)

    def carry(self, source: Path, name: str) -> None:
        """A copy of `source` under `name`."""
        with open_regular(source, "a file to carry") as found, self.file(name) as file:
            while data := found.read(1 << 22):
                write_all(file, data)

    def _publish(self) -> None:
        os.fsync(self.lock)
        aside = self.folder.with_name(self.folder.name + "-old")
        if os.path.lexists(self.out):
            self.out.rename(aside)
        try:
            self.folder.rename(self.out)
        except OSError:
            if os.path.lexists(aside):
                aside.rename(self.out)
            raise
        parent = os.open(self.out.parent, os.O_RDONLY | os.O_DIRECTORY)
        os.fsync(parent)
        os.close(parent)
        if aside.is_dir() and not aside.is_symlink():
            shutil.rmtree(aside)
        else:
            aside.unlink(missing_ok=True)

    def _clear(self) -> None:
        for path in self.folder.iterdir():
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink()


def refuse_overlap(out: Path, inputs: Iterable[Path]) -> None:
    """OutputExistsError if `out` is an input, lies in one or holds one: writing it would change what is read."""
    target = out.resolve()
    for path in (one.resolve() for one in inputs):
        if target == path or path in target.parents or target in path.parents:
            raise OutputExistsError(
                f"{printable(out)}: it overlaps with {printable(path)}, which is read; name another folder"
            )


def write_file(path: Path, data: bytes) -> None:
    """`data` as the file `path`, which is the old one or the new one, never a part."""
    partial = path.with_name(f".{path.name}.partial")
    with _faults(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with partial.open("wb", buffering=0) as file:
                write_all(file, data)
                os.fsync(file.fileno())
            partial.rename(path)
        finally:
            partial.unlink(missing_ok=True)


def write_all(file: BinaryIO, data: bytes | memoryview) -> None:
    """All of `data`, to an unbuffered file, whose `write` may stop short."""
    view = memoryview(data)
    while view:
        view = view[file.write(view) :]


@contextmanager
def _faults(where: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        found = error.strerror or type(error).__name__
        raise EnvironmentFault(
            f"{printable(where)}: writing failed ({found}); see to the disk and run again"
        ) from error
