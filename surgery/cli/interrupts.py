"""Signals that end a command: the first lets it leave its files in order, a second one ends it at once."""

import os
import signal
from types import FrameType

_ENDING = (signal.SIGINT, signal.SIGTERM)
_came: list[int] = []  # the numbers of those that came


class Interrupted(BaseException):  # as KeyboardInterrupt is none of the errors
    """A signal came; `exit_code` is 128 and its number."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.exit_code = 128 + number

    @staticmethod
    def come() -> "Interrupted | None":
        """One that came, whatever became of it: compiled code that imports may drop it, and fail of what it lacks."""
        return Interrupted(_came[0]) if _came else None

    @staticmethod
    def within(error: BaseException) -> "Interrupted | None":
        """The one that became this error: Python 3.11 makes a RuntimeError of all that `__set_name__` raises."""
        found: BaseException | None = error
        while found is not None and not isinstance(found, Interrupted):
            found = found.__cause__ or found.__context__
        return found


def listen() -> None:
    """Raise Interrupted in the main thread at the first of these signals."""
    for number in _ENDING:
        signal.signal(number, _first)


def _first(number: int, _: FrameType | None) -> None:
    for ending in _ENDING:
        signal.signal(ending, _second)
    _came.append(number)
    raise Interrupted(number)


def _second(number: int, _: FrameType | None) -> None:
    os._exit(128 + number)
