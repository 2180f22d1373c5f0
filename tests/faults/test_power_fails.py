"""The power fails at any call: the output is the old one, or the new one, or not there, whatever the disk kept."""

import random
from collections.abc import Sequence
from pathlib import Path

import pytest
from arena import COMMANDS, STAGING, Arena, Job, loads, weights
from hurts import KILL, Hurt, disk_functions
from power import Call, Disk, Found, flat, lay_folders, nested, read_trace

SEED = 23
ROUNDS = [10, pytest.param(250, marks=pytest.mark.slow)]  # states at each call


def trace(arena: Arena, job: Job, kill_at: int = 0, plain: bool = False) -> list[Call]:
    """The calls of a run; if `kill_at`, of one that is killed at that call and of the one that goes on."""
    path = arena.inputs.parent / "trace"
    path.unlink(missing_ok=True)
    arena.reset(job)
    hurt = Hurt(trace=str(path), no_renameat2=plain)
    if kill_at:
        arena.zygote.run(job.argv, hurt._replace(names=disk_functions(), at=kill_at, how=KILL))
        if arena.judge(job) == "new" and job.old is None:
            return []  # what it wrote is there, and nothing goes on
    done = arena.zygote.run(job.argv, hurt)
    assert done.code == 0, done
    return list(read_trace(path))


def before(job: Job) -> Found:
    return {} if job.old is None else {"out": nested(job.old)}


def replay(arena: Arena, job: Job, calls: Sequence[Call], rounds: int, rerun_every: int = 0) -> None:
    """At each call, so many states of the disk are judged; some of them are laid out and run again."""
    draw, disk, states = random.Random(SEED), Disk(arena.floor, before(job)), 0
    for call in calls:
        disk.call(*call)
        for _ in range(rounds):
            found = disk.survivors(draw)
            judge(job, found)
            states += 1
            if rerun_every and draw.randrange(rerun_every) == 0:
                arena.clear()
                lay_folders(found, arena.floor)
                arena.rerun(job)
    for _ in range(100 if calls else 0):  # once the run has ended it is certain
        assert flat(disk.survivors(draw)["out"]) == job.new
    arena.tally["states replayed"] += states


def judge(job: Job, found: Found) -> None:
    """Is the output whole, and nothing beside it that could be taken for one?"""
    name = "out" if "out" in found else ".out.surgery-old"
    out = flat(found[name]) if name in found else None
    assert out in (job.old, job.new), {name: len(data) for name, data in (out or {}).items()}
    staged = flat(found.get(STAGING, {}))
    assert not loads(staged) or weights(staged) in (weights(job.new), weights(job.old or {}))


@pytest.mark.parametrize("rounds", ROUNDS)
@pytest.mark.parametrize("name", COMMANDS)
def test_power_that_fails_at_any_call_leaves_the_old_or_the_new(arena: Arena, name: str, rounds: int) -> None:
    job = arena.jobs[name]
    replay(arena, job, trace(arena, job), rounds, rerun_every=rounds * 8)


@pytest.mark.parametrize("rounds", [2, pytest.param(20, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", COMMANDS)
def test_power_that_fails_in_a_run_that_goes_on_from_a_killed_one_leaves_the_old_or_the_new(
    arena: Arena, name: str, rounds: int
) -> None:
    job = arena.jobs[name]
    last = len(trace(arena, job))
    for kill_at in {
        *random.Random(SEED).sample(range(10, last), rounds),
        *range(last - 12, last, 1 if rounds > 2 else 3),
    }:
        replay(arena, job, trace(arena, job, kill_at), rounds)


@pytest.mark.parametrize("rounds", ROUNDS)
def test_power_that_fails_without_renameat2_leaves_the_old_or_the_new(arena: Arena, rounds: int) -> None:
    job = arena.jobs["overwrite"]
    replay(arena, job, trace(arena, job, plain=True), rounds, rerun_every=rounds * 8)


def test_the_folders_above_an_output_are_as_certain_as_the_output(arena: Arena) -> None:
    job = arena.jobs["fresh"]
    out = arena.floor / "new" / "newer" / "out"
    calls = trace(arena, job._replace(argv=[*job.argv[:-1], str(out)]))
    disk, draw = Disk(arena.floor, {}), random.Random(SEED)
    for call in calls:
        disk.call(*call)
    for _ in range(100):
        assert flat(disk.survivors(draw)) == {f"new/newer/out/{name}": data for name, data in job.new.items()}


@pytest.mark.parametrize("kept", ["fsync of the files", "fsync of the folders"])
def test_a_replay_tells_of_a_run_that_syncs_too_little(arena: Arena, kept: str) -> None:
    job = arena.jobs["overwrite"]
    of_files = [call for call in trace(arena, job) if call[0] != "sync" or Path(call[1]).suffix == ".partial"]
    of_folders = [call for call in trace(arena, job) if call[0] != "sync" or Path(call[1]).suffix != ".partial"]
    with pytest.raises((AssertionError, KeyError)):
        replay(arena, job, of_files if kept == "fsync of the files" else of_folders, 100)
