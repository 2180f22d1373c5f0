"""Report: what a function on files has found or written, as one line and as data."""

from abc import ABC, abstractmethod
from typing import Any


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
