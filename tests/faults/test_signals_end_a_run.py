"""Ctrl-C and SIGTERM at any point: exit code 130 or 143, the output whole, and a rerun that ends the work."""

import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from arena import LOCK, POINTS, STAGING, Arena, said
from hurts import SIGNALS, Hurt, disk_functions

ROOT = Path(__file__).parents[2]
SEED = 25
MOMENTS = [1, pytest.param(20, marks=pytest.mark.slow)]


@pytest.mark.parametrize("sent", SIGNALS)
@pytest.mark.parametrize(("name", "every"), POINTS)
def test_a_signal_at_any_call_that_changes_the_disk_ends_the_run_in_order(
    arena: Arena, name: str, every: int, sent: str
) -> None:
    job, hurt = arena.jobs[name], Hurt(disk_functions(), how=sent)
    for at in arena.points(name, hurt, every * 2):
        arena.reset(job)
        done = arena.zygote.run(job.argv, hurt._replace(at=at))
        assert done.struck, done
        arena.tally["signals sent"] += 1
        assert done.code in {128 + getattr(signal, sent), 0}, done  # 0: it came as the run ended
        assert not done.code or interrupted(done.err), done
        assert arena.strays() <= {STAGING, LOCK}
        arena.rerun(job)


def test_a_second_signal_ends_the_run_at_once(arena: Arena) -> None:
    job = arena.jobs["overwrite"]
    for at in range(3, 40, 12):
        arena.reset(job)
        done = arena.zygote.run(job.argv, Hurt(disk_functions(), at, "SIGTERM", lasting=True))
        arena.tally["signals sent"] += 2
        assert done.code == 143, done
        arena.rerun(job)


@pytest.mark.parametrize("sent", SIGNALS)
@pytest.mark.parametrize("moments", MOMENTS)
def test_a_signal_at_any_time_ends_the_real_command_line_in_order(arena: Arena, sent: str, moments: int) -> None:
    job, draw = arena.jobs["overwrite"], random.Random(f"{SEED} {sent}")
    arena.reset(job)
    whole_s = run_until(arena, job.argv, sent, 600)[1] if moments > 1 else 1.5
    for _ in range(moments):
        arena.reset(job)
        code, _, err = run_until(arena, job.argv, sent, draw.uniform(0.1, whole_s))
        number = getattr(signal, sent)
        assert code in {0, 128 + number, -number}, (code, err)  # the last: before it listens
        assert code != 128 + number or interrupted(err), err
        arena.rerun(job)


def interrupted(err: str) -> bool:
    (line,) = said(err)
    return line.startswith("surgery: interrupted")


def run_until(arena: Arena, argv: list[str], sent: str, wait_s: float) -> tuple[int, float, str]:
    """The exit code of a run that gets a signal after a time, how long it took, and what it said."""
    began = time.monotonic()
    command = [sys.executable, "-m", "surgery", *argv]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, cwd=ROOT) as process:
        try:
            process.wait(wait_s)
        except subprocess.TimeoutExpired:
            process.send_signal(getattr(signal, sent))
            arena.tally["signals sent"] += 1
        err = process.communicate()[1]
    return process.returncode, time.monotonic() - began, err
