"""Many processes write one output: one wins, the others are told at once, and nothing is mixed."""

import random

import pytest
from arena import LOCK, Arena, told
from hurts import KILL, Hurt, disk_functions

SEED = 24
PROCESSES = 16
ROUNDS = [3, pytest.param(200, marks=pytest.mark.slow)]
BUSY = ("another run is writing it (process ", "it exists; ", "it has appeared meanwhile; ")


@pytest.mark.parametrize("rounds", ROUNDS)
def test_of_many_runs_one_writes_the_output_and_the_others_say_busy(arena: Arena, rounds: int) -> None:
    fresh, overwrite = arena.jobs["fresh"], arena.jobs["overwrite"]
    other = [fresh.argv[0], fresh.argv[1], str(arena.other), fresh.argv[3]]
    for _ in range(rounds):
        arena.reset(fresh)
        found = arena.zygote.race([fresh.argv, other] * (PROCESSES // 2))
        arena.tally["processes raced"] += PROCESSES
        assert sorted(one.code for one in found) == [0] + [6] * (PROCESSES - 1), found
        assert all(any(reason in told(one, 6) for reason in BUSY) for one in found if one.code)
        winner = next(index for index, one in enumerate(found) if one.code == 0)
        assert arena.judge(fresh._replace(old=overwrite.old)) == ("old" if winner % 2 else "new")
        assert arena.strays() == set()


@pytest.mark.parametrize("rounds", [3, pytest.param(40, marks=pytest.mark.slow)])
def test_of_many_runs_that_overwrite_each_ends_or_says_busy(arena: Arena, rounds: int) -> None:
    job = arena.jobs["overwrite"]
    other = [*job.argv[:2], str(arena.other), *job.argv[3:]]
    for _ in range(rounds):
        arena.reset(job)
        found = arena.zygote.race([job.argv, other] * (PROCESSES // 2))
        arena.tally["processes raced"] += PROCESSES
        assert {one.code for one in found} <= {0, 6}, found
        assert any(one.code == 0 for one in found)
        assert all(BUSY[0] in told(one, 6) for one in found if one.code)
        assert arena.judge(job) in {"old", "new"}
        assert arena.strays() == set()


@pytest.mark.parametrize("rounds", [6, pytest.param(50, marks=pytest.mark.slow)])
def test_a_run_that_is_killed_lets_go_of_its_lock(arena: Arena, rounds: int) -> None:
    job, draw = arena.jobs["overwrite"], random.Random(SEED)
    for _ in range(rounds):
        arena.reset(job)
        kill = Hurt(disk_functions(), draw.randint(2, 60), KILL)
        first, second = arena.zygote.race([job.argv, job.argv], [kill, Hurt()])
        arena.tally["processes raced"] += 2
        arena.tally["points killed at"] += first.code == -9
        assert first.code in {0, -9, 6}, first
        assert second.code in {0, 6}, second
        assert arena.strays() <= {LOCK} or second.code == 6 or first.code == -9
        arena.rerun(job)
