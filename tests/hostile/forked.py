"""A merge of one input of the zoo in a child process: its exit code, and what it took of time and memory."""

import json
import os
import resource
import select
import signal
import time
from pathlib import Path
from typing import NamedTuple

from zoo import ZOO

from surgery.cli import main

PROCESSOR_S = 5  # what computes longer is killed
PATIENCE_S = 60.0  # what blocks longer hangs; less than what conftest gives a test, so that no child outlives its own


class Cost(NamedTuple):
    """How a merge ended. The code is None where it hung, 128 + n where signal n killed it."""

    code: int | None
    seconds: float = 0.0
    grown_bytes: int = 0  # resident memory at its peak, beyond what was there at the start


def merge_forked(folder: Path, name: str) -> Cost:
    """Damage the sound `folder` as `name` tells, and merge it."""
    ZOO[name].damage(folder)
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.alarm(int(PATIENCE_S))
        resource.setrlimit(resource.RLIMIT_CPU, (PROCESSOR_S, PROCESSOR_S + 1))
        silent = os.open(os.devnull, os.O_WRONLY)
        os.dup2(silent, 1)
        os.dup2(silent, 2)
        os.write(writer, json.dumps(_merged(folder)).encode())
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader, "rb") as told:
        if not select.select([told], [], [], PATIENCE_S)[0]:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            return Cost(None, PATIENCE_S)
        found = told.read()
    status = os.waitpid(child, 0)[1]
    if found:
        return Cost(*json.loads(found))
    killed = os.WTERMSIG(status)
    return Cost(None, PROCESSOR_S) if killed == signal.SIGXCPU else Cost(128 + killed)


def _merged(folder: Path) -> Cost:
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before, start = _resident("VmRSS"), time.process_time()
    code: object = None
    try:
        main(["merge", str(folder / "base"), str(folder / "adapter"), str(folder / "out")])
    except SystemExit as stopped:
        code = stopped.code or 0
    assert isinstance(code, int)
    return Cost(code, time.process_time() - start, _resident("VmHWM") - before)


def _resident(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(field))
