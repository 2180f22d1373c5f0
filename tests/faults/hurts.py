"""Hurt: what befalls a child, at the n-th call of the disk's functions, by a limit of the system, or not at all."""

import errno
import inspect
import os
import pickle
import resource
import shutil
import signal
import time
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from threading import RLock
from typing import Any, NamedTuple

from surgery.io import disk, memory, staging

READS = ("preadv",)  # of os, as io/tensor_file.py calls it
KILL, HALF_KILL, SHORT, HALF, NONE_WRITTEN = "kill", "half and kill", "one byte", "half", "no byte"
_OF_TWO_PATHS = ("rename", "place", "exchange")
SIGNALS = ("SIGINT", "SIGTERM")
_BEGIN_BYTES = 1 << 9  # so that the disk is told to begin with files of the tests, too


def disk_functions() -> tuple[str, ...]:
    """All that change the disk; what only calls them is left out."""
    found = inspect.getmembers(disk, inspect.isfunction)
    public = [name for name, one in found if one.__module__ == disk.__name__ and not name.startswith("_")]
    return tuple(name for name in public if name != "write_all")


class Hurt(NamedTuple):
    """`how` befalls the `at`-th call of the functions in `names`, and all after it if `lasting`."""

    names: tuple[str, ...] = ()
    at: int = 0
    how: str = ""
    lasting: bool = False
    limits: tuple[tuple[str, int], ...] = ()  # of the system, by name
    memory_bytes: int = -1  # that are left, unless negative
    strace: str = ""  # what strace injects
    trace: str = ""  # the file that takes the calls, for a replay
    delay_s: float = 0.0
    no_renameat2: bool = False


class Hurting:
    """A hurt that is laid over this process. `tell` is called once, when it strikes."""

    def __init__(self, hurt: Hurt, tell: Callable[[str], None]) -> None:
        self.hurt, self.tell, self.calls, self.lock = hurt, tell, 0, RLock()
        staging._BEGIN_BYTES = _BEGIN_BYTES
        if hurt.no_renameat2:
            disk._renameat2 = lambda *_: False
        self.trace = os.open(hurt.trace, os.O_WRONLY | os.O_CREAT | os.O_APPEND) if hurt.trace else None
        for name in disk_functions():
            setattr(disk, name, self._wrapped(name, getattr(disk, name)))
        if self.trace is not None:
            self._trace_removals()
        if "preadv" in hurt.names:
            os.preadv = self._read(os.preadv)
        for name, value in hurt.limits:
            limit = getattr(resource, name)
            resource.setrlimit(limit, (value, resource.getrlimit(limit)[1]))
        self.ballast = _ballast(hurt.memory_bytes) if hurt.memory_bytes >= 0 else []

    def _strikes(self, name: str, where: str) -> bool:
        if name not in self.hurt.names:
            return False
        self.calls += 1
        struck = self.calls == self.hurt.at or (self.hurt.lasting and self.calls > self.hurt.at)
        if self.calls == self.hurt.at:
            self.tell(f"{name} {where}")
        return struck

    def _wrapped(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(call)
        def hurt(*given: Any) -> Any:
            with self.lock:  # what is traced is in the order of what was done
                where = (_path(given[0]), *map(str, given[1:] if name in _OF_TWO_PATHS else ()))
                if self._strikes(name, str(where[0])):
                    return self._strike(name, call, given)
                done = call(*given)
                size = given[1:] if name == "allocate" else ()
                self._record(name, (*where, *size), given, done)
                return done

        return hurt

    def _strike(self, name: str, call: Callable[..., Any], given: tuple[Any, ...]) -> Any:
        how = self.hurt.how
        if how == HALF_KILL and name == "write":
            call(given[0], given[1][: len(given[1]) // 2])
        if how in {KILL, HALF_KILL}:
            os.kill(os.getpid(), signal.SIGKILL)
        if how in SIGNALS:
            os.kill(os.getpid(), getattr(signal, how))
            time.sleep(0.05)  # where another thread holds the call, let the first one hear of it
            return call(*given)
        if how in {SHORT, HALF, NONE_WRITTEN}:
            size = {SHORT: 1, HALF: (len(given[1]) + 1) // 2, NONE_WRITTEN: 0}[how]
            return call(given[0], given[1][:size]) if size else 0
        raise _error(how)

    def _read(self, call: Callable[..., int]) -> Callable[..., int]:
        def hurt(descriptor: int, buffers: list[memoryview], offset: int) -> int:
            with self.lock:
                if not self._strikes("preadv", _path(descriptor)):
                    return call(descriptor, buffers, offset)
            if self.hurt.how == KILL:
                os.kill(os.getpid(), signal.SIGKILL)
            if self.hurt.how not in {SHORT, HALF}:
                raise _error(self.hurt.how)
            size = 1 if self.hurt.how == SHORT else (len(buffers[0]) + 1) // 2
            return call(descriptor, [buffers[0][:size]], offset)

        return hurt

    def _record(self, name: str, where: tuple[object, ...], given: tuple[Any, ...], done: Any) -> None:
        if self.trace is None or done is False:  # nothing was exchanged
            return
        more = (bytes(given[1][:done]),) if name == "write" else ()
        os.write(self.trace, pickle.dumps((name, *where, *more)))

    def _trace_removals(self) -> None:
        """Folders are removed by shutil, files that may be missing by pathlib."""
        remove_tree, unlink = shutil.rmtree, Path.unlink

        def traced_tree(path: Path, **options: Any) -> None:
            with self.lock:
                for one in sorted(path.rglob("*"), reverse=True):
                    self._record("remove_folder" if one.is_dir() else "remove", (str(one),), (), None)
                self._record("remove_folder", (str(path),), (), None)
                remove_tree(path, **options)

        def traced_unlink(path: Path, missing_ok: bool = False) -> None:
            with self.lock:
                if os.path.lexists(path):
                    self._record("remove", (str(path),), (), None)
                unlink(path, missing_ok=missing_ok)

        shutil.rmtree, Path.unlink = traced_tree, traced_unlink


def _path(given: Path | int) -> str:
    """A path, of a descriptor too."""
    return str(Path(f"/proc/self/fd/{given}").readlink() if isinstance(given, int) else given)


def _error(name: str) -> OSError:
    number = getattr(errno, name)
    return OSError(number, os.strerror(number))


def _ballast(left: int) -> list[bytearray]:
    """All memory that this process may have, but for `left` bytes."""
    memory.require_room_for_torch = lambda: None  # torch is loaded here, and its room is not free
    size_bytes = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (size_bytes, resource.RLIM_INFINITY))
    taken, size = [], 1 << 24
    while size >= 1 << 12:
        try:
            taken.append(bytearray(size))
        except MemoryError:
            size //= 2
    resource.setrlimit(resource.RLIMIT_AS, (size_bytes + left, resource.RLIM_INFINITY))
    return taken
