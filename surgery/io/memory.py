"""Memory: is there any, and how the C library hands freed memory back."""

import ctypes
import mmap
import re
from pathlib import Path

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h

_ROOM_BYTES = 1 << 30  # of address space; torch's libraries for CPUs take 0.6 of it, tiles and threads some more


def require_room_for_torch() -> None:
    """MemoryError where a limit leaves too little address space to load torch and work with it.

    Its libraries end the process where they get none, and no one hears why.
    """
    if not hasattr(mmap, "MAP_PRIVATE"):
        return
    try:  # taken and given back, never touched
        mmap.mmap(-1, _ROOM_BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, prot=0).close()
    except OSError as error:
        raise MemoryError from error


def available_bytes() -> int:
    """What may be taken without others being swapped out, where the system tells; else 8 GB."""
    try:
        told = Path("/proc/meminfo").read_text()
    except OSError:
        return 8_000_000_000
    found = re.search(r"MemAvailable:\s+(\d+) kB", told)
    return int(found[1]) * 1024 if found else 8_000_000_000


def keep_freed_memory() -> None:
    """Let this process keep what its tiles free, up to 256 MB, instead of asking for zeroed pages at each tile.

    For programs, not for libraries: it holds for the whole process. Nothing happens where there is no glibc.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_MMAP_THRESHOLD, 32 << 20)
        mallopt(_TRIM_THRESHOLD, 256 << 20)
