"""Regular files: opened without ever waiting, and only where they lie in the folder that they are listed in."""

import hashlib
import os
import stat
from collections.abc import Iterator
from io import BufferedReader
from pathlib import Path

from surgery.errors import AbsentError, EnvironmentFault, FormatError, InputError, printable

_PIECE_BYTES = 1 << 20


def open_descriptor(path: Path, what: str) -> int:
    """A descriptor of the regular file at `path`. A pipe or device is refused, and not waited for."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        kind = AbsentError if isinstance(error, FileNotFoundError) else InputError
        raise kind(
            f"{printable(path)}: cannot be opened ({error.strerror}); {what} is wanted; check the path"
        ) from error
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise FormatError(f"{printable(path)}: not a regular file; {what} is wanted")
    return descriptor


def open_regular(path: Path, what: str) -> BufferedReader:
    """The regular file at `path`, for reading; InputError if it cannot be opened."""
    return os.fdopen(open_descriptor(path, what), "rb")


def read_pieces(path: Path, what: str) -> Iterator[bytes]:
    """The bytes of the regular file at `path`, some at a time. EnvironmentFault where the disk gives none."""
    with open_regular(path, what) as file:
        try:
            while piece := file.read(_PIECE_BYTES):
                yield piece
        except OSError as error:
            raise EnvironmentFault(f"{printable(path)}: reading failed ({error.strerror}); check the disk") from error


def file_sha256(path: Path) -> str:
    """sha256 of a file's bytes."""
    sha256 = hashlib.sha256()
    for piece in read_pieces(path, "a file"):
        sha256.update(piece)
    return sha256.hexdigest()


def contained(folder: Path, name: str | Path) -> Path:
    """`folder / name`, unless a link in the folder leads out of it; the folder itself may be reached through one.

    The Hub's cache is such that its snapshots link to blobs of the same repository, which is allowed.
    """
    root, found = Path(os.path.realpath(folder)), Path(os.path.realpath(folder / name))
    if root != found and root not in found.parents and found.parent not in _blobs(root):
        raise FormatError(
            f"{printable(folder / name)}: a link that leads out of its folder, to {printable(found)}; "
            "a file of the folder is wanted; put a copy there"
        )
    return folder / name


def _blobs(root: Path) -> list[Path]:
    """Where the Hub's cache keeps the files of the snapshot that `root` is or lies in."""
    inner = [root, *root.parents]
    return [one.parent.parent / "blobs" for one in inner if one.parent.name == "snapshots"][:1]
