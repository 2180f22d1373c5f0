"""kill -9 at each call that changes the disk: the output is the old one, or the new one, or not there."""

import random

import pytest
from arena import COMMANDS, POINTS, Arena
from hurts import HALF_KILL, KILL, Hurt, disk_functions

SEED = 20
STEP = 5  # of the calls of either run of a pair

ANY = Hurt(disk_functions(), how=KILL)


def killed(arena: Arena, name: str, at: int, hurt: Hurt = ANY) -> bool:
    """Run a command and kill it at its `at`-th call; false if it ended before."""
    done = arena.zygote.run(arena.jobs[name].argv, hurt._replace(at=at))
    assert done.code == (-9 if done.struck else 0), done
    arena.tally["points killed at"] += bool(done.struck)
    return bool(done.struck)


@pytest.mark.parametrize(("name", "every"), POINTS)
def test_a_run_killed_at_any_call_leaves_the_old_or_the_new_and_a_rerun_ends_it(
    arena: Arena, name: str, every: int
) -> None:
    job, points = arena.jobs[name], arena.points(name, ANY, every)
    for at in points:
        arena.reset(job)
        assert killed(arena, name, at)
        arena.rerun(job)
    assert points[-1] > 40


@pytest.mark.slow
@pytest.mark.parametrize("name", COMMANDS)
def test_a_run_killed_within_any_write_is_no_worse(arena: Arena, name: str) -> None:
    job, hurt = arena.jobs[name], Hurt(("write",), how=HALF_KILL)
    for at in arena.points(name, hurt):
        arena.reset(job)
        assert killed(arena, name, at, hurt)
        arena.rerun(job)


@pytest.mark.parametrize("name", COMMANDS)
def test_a_run_killed_twice_ends_as_one_that_was_not(arena: Arena, name: str) -> None:
    draw, job = random.Random(f"{SEED} {name}"), arena.jobs[name]
    for _ in range(5):
        killed_twice(arena, name, draw.randint(10, 60), draw.randint(1, 60))
    assert arena.judge(job) == "new"


@pytest.mark.slow
@pytest.mark.parametrize("name", COMMANDS)
def test_a_run_killed_twice_at_pairs_of_calls_ends_as_one_that_was_not(arena: Arena, name: str) -> None:
    for first in arena.points(name, ANY, STEP):
        second = 1 + first % STEP  # others each time
        while killed_twice(arena, name, first, second):
            second += STEP


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


@pytest.mark.parametrize("every", [10, pytest.param(1, marks=pytest.mark.slow)])
def test_without_renameat2_the_old_output_is_put_back_by_a_rerun(arena: Arena, every: int) -> None:
    job, hurt, absent = arena.jobs["overwrite"], ANY._replace(no_renameat2=True), 0
    for at in arena.points("overwrite", hurt, every):
        arena.reset(job)
        assert killed(arena, "overwrite", at, hurt)
        absent += not arena.out.exists()
        arena.rerun(job)
    assert absent == 1  # between its two renames
