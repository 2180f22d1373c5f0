"""kill -9 at each call that changes the disk: the output is the old one, or the new one, or not there."""

import random

import pytest
from arena import COMMANDS, POINTS, Arena
from hurts import HALF_KILL, KILL, Hurt, disk_functions

SEED = 20


def killed(arena: Arena, name: str, at: int, how: str = KILL, plain: bool = False) -> bool:
    """Run a command and kill it at its `at`-th call; false if it ended before."""
    done = arena.zygote.run(arena.jobs[name].argv, Hurt(disk_functions(), at, how, no_renameat2=plain))
    assert done.code == (-9 if done.struck else 0), done
    arena.tally["points killed at"] += bool(done.struck)
    return bool(done.struck)


@pytest.mark.parametrize(("name", "every"), POINTS)
def test_a_run_killed_at_any_call_leaves_the_old_or_the_new_and_a_rerun_ends_it(
    arena: Arena, name: str, every: int
) -> None:
    job, at = arena.jobs[name], 0
    while True:
        at += every
        arena.reset(job)
        if not killed(arena, name, at):
            break
        arena.judge(job)
        arena.rerun(job)
    assert at > 40


@pytest.mark.slow
@pytest.mark.parametrize("name", COMMANDS)
def test_a_run_killed_within_any_write_is_no_worse(arena: Arena, name: str) -> None:
    job, at = arena.jobs[name], 0
    while True:
        at += 1
        arena.reset(job)
        done = arena.zygote.run(job.argv, Hurt(("write",), at, HALF_KILL))
        if not done.struck:
            break
        arena.tally["points killed at"] += 1
        arena.rerun(job)
    assert at > 10


@pytest.mark.parametrize("name", COMMANDS)
def test_a_run_killed_twice_ends_as_one_that_was_not(arena: Arena, name: str) -> None:
    draw, job = random.Random(f"{SEED} {name}"), arena.jobs[name]
    for _ in range(5):
        killed_twice(arena, name, draw.randint(10, 60), draw.randint(1, 60))
    assert arena.judge(job) == "new"


@pytest.mark.slow
@pytest.mark.parametrize("name", COMMANDS)
def test_a_run_killed_twice_at_any_pair_of_calls_ends_as_one_that_was_not(arena: Arena, name: str) -> None:
    first = 0
    while first % 3 or killed_twice(arena, name, first + 1, 1):
        first += 1
        second = 1 + first % 3
        while killed_twice(arena, name, first, second):
            second += 3


def killed_twice(arena: Arena, name: str, first: int, second: int) -> bool:
    """Then run it to its end; false if the second run ended before it could be killed."""
    job = arena.jobs[name]
    arena.reset(job)
    killed(arena, name, first)
    if arena.judge(job) == "new" and job.old is None:
        return False
    hurt = killed(arena, name, second)
    arena.rerun(job) if hurt else arena.judge(job)
    return hurt


@pytest.mark.slow
def test_without_renameat2_the_old_output_is_put_back_by_a_rerun(arena: Arena) -> None:
    job, at, absent = arena.jobs["overwrite"], 0, 0
    while True:
        at += 1
        arena.reset(job)
        if not killed(arena, "overwrite", at, plain=True):
            break
        absent += not arena.out.exists()
        arena.rerun(job)
    assert absent == 1  # between its two renames
