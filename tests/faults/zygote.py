"""Zygote: a warmed-up process that forks a child for each run of the command line, hurt as told.

It is a process of its own because a fork is safe only where no thread of torch has ever run.
"""

import gc
import os
import pickle
import shutil
import signal
import subprocess
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO, NamedTuple, NoReturn

from hurts import Hurt, Hurting

HANG_S = 60
_ENVIRONMENT = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONHASHSEED": "0"}
_ANY_TRACER = 0x59616D61, -1  # PR_SET_PTRACER, PR_SET_PTRACER_ANY: strace may attach where only parents could


class Outcome(NamedTuple):
    """Of a run. `code` is its exit code, or minus the signal that ended it; `struck` the call that was hurt.

    `calls` are those that could have been, in a run that came to its end.
    """

    code: int
    err: str
    struck: str
    calls: int


class Zygote:
    """Use as a context. `code` is run once, to be warm too."""

    def __init__(self, warm: Path, code: str = "") -> None:
        self.process = subprocess.Popen(
            [sys.executable, __file__, str(warm), code],
            env=os.environ | _ENVIRONMENT | {"PYTHONPATH": os.pathsep.join(one for one in sys.path if one)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )

    def __enter__(self) -> "Zygote":
        return self

    def __exit__(self, *_: object) -> None:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.close()
        self.process.wait()
        self.process.stdout.close()

    def run(self, argv: Sequence[str], hurt: Hurt | None = None) -> Outcome:
        """The command line in a child."""
        return self.race([argv], [hurt or Hurt()])[0]

    def race(self, argvs: Sequence[Sequence[str]], hurts: Sequence[Hurt] | None = None) -> list[Outcome]:
        """Several at once."""
        jobs = list(zip(argvs, hurts or [Hurt()] * len(argvs), strict=True))
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        pickle.dump([(list(argv), tuple(hurt)) for argv, hurt in jobs], self.process.stdin)
        self.process.stdin.flush()
        return [Outcome(*one) for one in pickle.load(self.process.stdout)]


class _Child:
    """A forked child that waits at the gate; what it says is kept in memory."""

    def __init__(self, argv: list[str], hurt: Hurt, gate: tuple[int, int]) -> None:
        self.said, self.struck, self.calls = (os.memfd_create(name) for name in ("said", "struck", "calls"))
        self.hurt, self.tracer = hurt, None
        self.pid = os.fork()
        if self.pid == 0:
            os.close(gate[1])
            self._live(argv, gate[0])
        if hurt.strace:
            self.tracer = _attached(self.pid, hurt.strace)

    def outcome(self) -> tuple[int, str, str, int]:
        _, status = os.waitpid(self.pid, 0)
        if self.tracer is not None:
            assert self.tracer.stderr is not None
            self.tracer.stderr.close()
            self.tracer.wait()
        code = os.waitstatus_to_exitcode(status)
        return code, _content(self.said), _content(self.struck), int(_content(self.calls) or "0")

    def _live(self, argv: list[str], gate: int) -> NoReturn:
        signal.alarm(HANG_S)
        if self.hurt.strace:
            _allow_tracer()
        null = os.open(os.devnull, os.O_RDWR)
        os.dup2(null, 0)
        os.dup2(null, 1)
        os.dup2(self.said, 2)
        code = 1
        try:
            os.read(gate, 1)
            hurting = Hurting(self.hurt, lambda name: os.pwrite(self.struck, name.encode(), 0))
            try:
                _main(argv)
            finally:
                os.pwrite(self.calls, str(hurting.calls).encode(), 0)
        except SystemExit as stop:
            code = stop.code if isinstance(stop.code, int) else 0
        except BaseException:  # noqa: BLE001  # whatever it is, the child says it and ends here
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(code)


def _main(argv: list[str]) -> None:
    """As a program of its own; `python CODE` is one that uses the library."""
    from surgery.cli import main

    if argv[0] == "python":
        exec(argv[1], {})
        sys.exit()
    sys.argv = ["surgery", *argv]
    main()


def _attached(pid: int, injected: str) -> subprocess.Popen[bytes]:
    """strace on the process `pid`, once it is there."""
    call = injected.partition(":")[0]
    told = [shutil.which("strace") or "strace", "-f", "-p", str(pid), "-o", os.devnull]
    process = subprocess.Popen(
        [*told, "-e", f"trace={call}", "-e", f"inject={injected}"], stdin=subprocess.DEVNULL, stderr=subprocess.PIPE
    )
    assert process.stderr is not None
    line = process.stderr.readline()
    if b"attached" not in line:
        raise RuntimeError(line.decode())
    return process


def _allow_tracer() -> None:
    import ctypes

    ctypes.CDLL(None).prctl(*_ANY_TRACER, 0, 0, 0)


def _content(descriptor: int) -> str:
    data = os.pread(descriptor, 1 << 20, 0)
    os.close(descriptor)
    return data.decode()


def _serve(requests: BinaryIO, answers: BinaryIO) -> None:
    while True:
        try:
            jobs = pickle.load(requests)
        except EOFError:
            return
        gate = os.pipe()
        children = [_Child(argv, Hurt(*hurt), gate) for argv, hurt in jobs]
        os.close(gate[0])
        os.close(gate[1])  # now all may go
        pickle.dump([one.outcome() for one in children], answers)
        answers.flush()


def _warm_up(folder: Path, code: str) -> None:
    """Import all that a run imports: a run of each command, in this process, and of `code`."""
    base, adapter = folder / "base", folder / "adapter"
    for argv in (
        ["merge", str(base), str(adapter), str(folder / "warm"), "--reversible"],
        ["unmerge", str(folder / "warm"), str(folder / "back")],
        ["verify", str(folder / "warm")],
        ["python", code],
    ):
        try:
            _main(argv)
        except SystemExit as stop:
            if stop.code:
                raise
    gc.freeze()


if __name__ == "__main__":
    stdout = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    _warm_up(Path(sys.argv[1]), sys.argv[2])
    _serve(sys.stdin.buffer, stdout)
