"""kill -9 at each system call that writes, by strace: of a warmed-up process, and of the real command line."""

import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from arena import COMMANDS, Arena, told
from hurts import Hurt

CALLS = (
    *("openat", "close", "mkdir", "write", "pwrite64", "ftruncate", "fallocate", "fsync", "flock"),
    *("rename", "renameat2", "unlink", "unlinkat", "rmdir"),
)
SURE = ("openat", "mkdir", "write", "fsync", "rename")  # each run makes them; the rest depend on the system's library
SEED = 22


def strace_works() -> bool:
    if shutil.which("strace") is None:
        return False
    command = ["strace", "-f", "-o", os.devnull, "-e", "inject=getcwd:error=EIO", "true"]
    return subprocess.run(command, check=False, capture_output=True).returncode == 0


pytestmark = pytest.mark.skipif(not strace_works(), reason="strace cannot trace here")


def killed(arena: Arena, name: str, call: str, at: int) -> bool:
    """A run is killed at the `at`-th such call of any one of its threads; false if it ended before."""
    job = arena.jobs[name]
    arena.reset(job)
    done = arena.zygote.run(job.argv, Hurt(strace=f"{call}:signal=SIGKILL:when={at}"))
    assert done.code in {0, -9}, done
    arena.tally["points killed at"] += done.code == -9
    if done.code == -9:
        arena.judge(job)
        arena.rerun(job)
    return done.code == -9


@pytest.mark.slow
@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("name", COMMANDS)
def test_a_run_killed_at_any_system_call_leaves_the_old_or_the_new(arena: Arena, name: str, call: str) -> None:
    at = 1
    while killed(arena, name, call, at):
        at += 1
    assert at > 1 or call not in SURE


@pytest.mark.parametrize("name", COMMANDS)
def test_a_run_killed_at_some_system_calls_leaves_the_old_or_the_new(arena: Arena, name: str) -> None:
    draw = random.Random(f"{SEED} {name}")
    found = [killed(arena, name, draw.choice(CALLS), draw.randint(1, 9)) for _ in range(8)]
    assert any(found)


@pytest.mark.parametrize("call", ["fsync", "write", "preadv,preadv2", "flock"])
def test_a_call_that_a_signal_cuts_short_is_made_again(arena: Arena, call: str) -> None:
    job = arena.jobs["overwrite"]
    arena.reset(job)
    done = arena.zygote.run(job.argv, Hurt(strace=f"{call}:error=EINTR:when=1+2"))
    assert done.code == 0, done
    assert arena.judge(job) == "new"
    assert arena.strays() == set()
    arena.tally["errors injected"] += 1


@pytest.mark.slow
@pytest.mark.parametrize("call", ["fsync", "rename", "renameat2", "write", "fallocate"])
@pytest.mark.parametrize("name", COMMANDS)
def test_a_system_call_that_fails_leaves_the_output_as_it_was(arena: Arena, name: str, call: str) -> None:
    job, at = arena.jobs[name], 1
    while True:
        arena.reset(job)
        done = arena.zygote.run(job.argv, Hurt(strace=f"{call}:error=EIO:when={at}"))
        if done.code == 0:  # it ended before, or what failed was its report
            break
        arena.tally["errors injected"] += 1
        assert done.code == 5, done
        assert call == "write" or told(done)  # the line itself may be what was not written
        assert call == "write" or arena.judge(job) in {"old", "absent"}  # nor the report, after all was done
        arena.rerun(job)
        at += 1
    assert at > 1 or call not in SURE


@pytest.mark.parametrize(("call", "at"), [("rename", 1), ("renameat2", 1), ("fsync", 2)])
def test_the_real_command_line_killed_leaves_the_old_or_the_new(arena: Arena, call: str, at: int) -> None:
    real_command_killed(arena, call, at)


@pytest.mark.slow
@pytest.mark.parametrize("call", ["mkdir", "fsync", "rename", "renameat2", "unlink", "fallocate", "pwrite64", "flock"])
def test_the_real_command_line_killed_at_any_call_leaves_the_old_or_the_new(arena: Arena, call: str) -> None:
    at = 1
    while real_command_killed(arena, call, at):
        at += 1
    assert at > 1 or call not in SURE


def real_command_killed(arena: Arena, call: str, at: int) -> bool:
    job = arena.jobs["overwrite"]
    arena.reset(job)
    injected = ["-e", f"trace={call}", "-e", f"inject={call}:signal=SIGKILL:when={at}"]
    command = ["strace", "-f", "-o", os.devnull, *injected, sys.executable, "-m", "surgery", *job.argv]
    done = subprocess.run(command, check=False, capture_output=True, cwd=Path(__file__).parents[2])
    assert done.returncode in {0, -9, 137}, done
    arena.tally["points killed at"] += done.returncode != 0
    arena.judge(job)
    arena.rerun(job)
    return done.returncode != 0
