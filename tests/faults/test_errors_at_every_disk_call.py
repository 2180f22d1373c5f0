"""The system refuses a call: exit code 5 and one line, the output as it was, and a rerun that ends the work."""

import random
from collections.abc import Sequence

import pytest
from arena import COMMANDS, LOCK, OLD, POINTS, STAGING, Arena, told
from hurts import HALF, NONE_WRITTEN, SHORT, Hurt, disk_functions

from surgery.io.journal import NAME

ERRORS = ("ENOSPC", "EIO", "EDQUOT", "EFBIG", "EROFS", "EACCES")
READS = ("preadv",)
SEED = 21


def refused(arena: Arena, name: str, hurt: Hurt) -> None:
    """Run a command that is refused a call. Only the lock's removal may fail unseen."""
    job = arena.jobs[name]
    arena.reset(job)
    done = arena.zygote.run(job.argv, hurt)
    assert done.struck, done
    arena.tally["errors injected"] += 1
    if done.struck.startswith("remove") and done.struck.endswith(LOCK) and not done.code:
        assert arena.judge(job) == "new"
        assert arena.strays() == {LOCK}
        return
    told(done)
    assert arena.judge(job) == ("old" if job.old else "absent") or hurt.lasting
    assert arena.strays() <= {STAGING, LOCK, OLD} if hurt.lasting else arena.strays() <= may_stay(arena)
    arena.rerun(job)


def may_stay(arena: Arena) -> set[str]:
    """A folder with a finished part: its journal has a line after the first."""
    journal = arena.floor / STAGING / NAME
    return {STAGING} if journal.is_file() and len(journal.read_bytes().splitlines()) > 1 else set()


def at_every_call(arena: Arena, name: str, hurt: Hurt, errors: Sequence[str], every: int = 1) -> None:
    """Each call, or every so many, is refused; the reasons come in turn, where there is one run a call."""
    for at in arena.points(name, hurt, every):
        refused(arena, name, hurt._replace(at=at, how=errors[at % len(errors)]))


@pytest.mark.parametrize(("name", "every"), [("fresh", 7), ("overwrite", 5)])
def test_a_call_that_is_refused_leaves_the_output_as_it_was(arena: Arena, name: str, every: int) -> None:
    at_every_call(arena, name, Hurt(disk_functions()), ERRORS, every)


@pytest.mark.slow
@pytest.mark.parametrize("error", ERRORS)
@pytest.mark.parametrize("name", COMMANDS)
def test_a_call_that_is_refused_for_any_reason_leaves_the_output_as_it_was(arena: Arena, name: str, error: str) -> None:
    at_every_call(arena, name, Hurt(disk_functions()), [error])


@pytest.mark.parametrize(("name", "every"), POINTS[1:])
def test_a_disk_that_refuses_everything_from_some_call_on_leaves_the_output_whole(
    arena: Arena, name: str, every: int
) -> None:
    at_every_call(arena, name, Hurt(disk_functions(), lasting=True), ERRORS, every)


@pytest.mark.slow
@pytest.mark.parametrize("function", disk_functions())
@pytest.mark.parametrize("name", COMMANDS)
def test_a_call_that_is_refused_from_some_time_on_leaves_the_output_whole(
    arena: Arena, name: str, function: str
) -> None:
    at_every_call(arena, name, Hurt((function,), lasting=True), ERRORS)


@pytest.mark.slow
def test_without_renameat2_a_refused_call_leaves_the_output_as_it_was(arena: Arena) -> None:
    at_every_call(arena, "overwrite", Hurt(disk_functions(), no_renameat2=True), ERRORS)
    at_every_call(arena, "fresh", Hurt(disk_functions(), no_renameat2=True), ERRORS)


@pytest.mark.parametrize("name", COMMANDS)
@pytest.mark.parametrize("how", [SHORT, HALF])
def test_writes_that_stop_short_are_gone_on_with(arena: Arena, name: str, how: str) -> None:
    job = arena.jobs[name]
    arena.reset(job)
    done = arena.zygote.run(job.argv, Hurt(("write",), 1, how, lasting=True))
    assert (done.code, bool(done.struck)) == (0, True), done
    assert arena.judge(job) == "new"
    assert arena.strays() == set()
    arena.tally["errors injected"] += 1


@pytest.mark.parametrize(("name", "every"), POINTS)
def test_a_write_that_writes_nothing_is_an_error(arena: Arena, name: str, every: int) -> None:
    at_every_call(arena, name, Hurt(("write",)), [NONE_WRITTEN], every)


@pytest.mark.parametrize("name", COMMANDS)
@pytest.mark.parametrize("how", [SHORT, HALF])
def test_reads_that_stop_short_are_gone_on_with(arena: Arena, name: str, how: str) -> None:
    job = arena.jobs[name]
    arena.reset(job)
    done = arena.zygote.run(job.argv, Hurt(READS, 1, how, lasting=True))
    assert (done.code, bool(done.struck)) == (0, True), done
    assert arena.judge(job) == "new"
    arena.tally["errors injected"] += 1


@pytest.mark.parametrize(("name", "every"), POINTS)
def test_a_read_that_fails_leaves_the_output_as_it_was(arena: Arena, name: str, every: int) -> None:
    at_every_call(arena, name, Hurt(READS), ["EIO"], every)


@pytest.mark.parametrize("name", COMMANDS)
def test_calls_refused_and_runs_killed_in_turn_end_as_one_that_was_not(arena: Arena, name: str) -> None:
    draw, job = random.Random(f"{SEED} {name}"), arena.jobs[name]
    arena.reset(job)
    for _ in range(6):
        how = draw.choice([*ERRORS, "kill"])
        arena.zygote.run(job.argv, Hurt(disk_functions(), draw.randint(10, 40), how))
        if arena.judge(job) == "new":
            break
    arena.rerun(job)
