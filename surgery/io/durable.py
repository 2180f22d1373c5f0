"""Durable: names and bytes that are on the disk when the call returns, and what the system refuses told as a fault."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from surgery.errors import EnvironmentFault, SurgeryError, printable
from surgery.io import disk

PARTIAL = ".partial"  # ends the name of a file that is not whole yet


def write_file(path: Path, data: bytes) -> None:
    """`data` as the file `path`: the old one or the new one, never a part, also where several processes write it."""
    partial = path.with_name(f".{path.name}.{os.getpid()}{PARTIAL}")
    with faults(path):
        make_folder(path.parent)
        partial.unlink(missing_ok=True)
        descriptor = disk.create(partial)
        try:
            disk.write_all(descriptor, data)
            disk.sync(descriptor)
            disk.rename(partial, path)
        finally:
            os.close(descriptor)
            partial.unlink(missing_ok=True)
        sync_folder(path.parent)


def remove_other(path: Path, data: bytes) -> None:
    """A file at `path` that holds anything but `data` is gone, from the disk too, when this returns."""
    with faults(path):
        if path.exists() and path.read_bytes() != data:
            disk.remove(path)
            sync_folder(path.parent)


@contextmanager
def faults(where: Path) -> Iterator[None]:
    """EnvironmentFault, naming `where`, for what the system refuses; what is told already stays."""
    try:
        yield
    except SurgeryError:  # an AbsentError is an OSError too
        raise
    except OSError as error:
        found = error.strerror or type(error).__name__
        raise EnvironmentFault(
            f"{printable(where)}: writing failed ({found}); see to the disk and run again"
        ) from error


def make_folder(path: Path) -> None:
    """The folder and its parents; on the disk when this returns."""
    lacking = [one for one in (path, *path.parents) if not one.exists()]
    disk.make_folder(path)
    for one in lacking:
        sync_folder(one.parent)


def sync_folder(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        disk.sync(descriptor)
    finally:
        os.close(descriptor)


def remove_all(path: Path) -> None:
    """A folder with all in it, or a file or link, if it is there; what cannot be removed is in nobody's way."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):
            path.unlink(missing_ok=True)
