"""collector: Python's search for garbage, paused while much is made that stays."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def collector_paused() -> Iterator[None]:
    """It would go over all that is there again and again: half the time of an inject, a tenth of that of a trace."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def collect_seldom() -> None:
    """Look for cycles at every hundred thousandth object: importing torch makes a million, and no garbage of note.

    For programs, not for libraries: it holds for the whole process. A command begins a fifth of a second earlier.
    """
    gc.set_threshold(100_000, 20, 50)
