"""Report: what a function on files has found or written, as one line and as data."""

from abc import ABC, abstractmethod
from typing import Any

_UNITS = ((10**9, "GB"), (10**6, "MB"), (10**3, "kB"))


def in_units(size_bytes: int) -> str:
    """A size in the largest unit of which it has one.

    >>> in_units(832), in_units(1_300), in_units(7_240_000_000)
    ('832 bytes', '1.3 kB', '7.2 GB')
    """
    return next(
        (f"{size_bytes / unit:.1f} {name}" for unit, name in _UNITS if size_bytes >= unit), f"{size_bytes} bytes"
    )


class Report(ABC):
    """Shown, it is its summary: never the receipt or the tables that it holds. Dataclasses of it take repr=False."""

    @abstractmethod
    def summary(self) -> str:
        """One line."""

    @abstractmethod
    def to_json(self) -> dict[str, Any]:
        """All of it, as data."""

    def __str__(self) -> str:
        return self.summary()

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.summary()})"
