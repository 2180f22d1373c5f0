"""Regular files: opened for reading without ever waiting, and only where they lie in the folder that they are of."""

import os
import stat
from pathlib import Path
from typing import BinaryIO

from surgery.errors import FormatError, InputError, printable


def open_descriptor(path: Path, what: str) -> int:
    """A descriptor of the regular file at `path`. A pipe or device is refused, and not waited for."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        raise InputError(
            f"{printable(path)}: cannot be opened ({error.strerror}); {what} is wanted; check the path"
        ) from error
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise FormatError(f"{printable(path)}: not a regular file; {what} is wanted")
    return descriptor


def open_regular(path: Path, what: str) -> BinaryIO:
    """The regular file at `path`, for reading; InputError if it cannot be opened."""
    return os.fdopen(open_descriptor(path, what), "rb")
