"""A run that was cut short is gone on with: what was finished is not written again, unless it was damaged."""

import json
from pathlib import Path

import pytest
from arena import POINTS, STAGING, Arena
from hurts import KILL, Hurt, disk_functions
from power import read_trace

from surgery.io.journal import NAME as JOURNAL


def finished(arena: Arena) -> set[str]:
    """The files of the parts that the journal has."""
    path = arena.floor / STAGING / JOURNAL
    lines = path.read_bytes().splitlines()[1:] if path.is_file() else []
    return {name for line in lines for name in json.loads(line)["told"]["files"]}


def written(arena: Arena, argv: list[str], trace: Path) -> set[str]:
    """The files of the output that a run writes."""
    trace.unlink(missing_ok=True)
    done = arena.zygote.run(argv, Hurt(trace=str(trace)))
    assert done.code == 0, done
    made = [Path(call[1]).relative_to(arena.floor / STAGING) for call in read_trace(trace) if call[0] == "create"]
    return {path.as_posix().removesuffix(".partial") for path in made} - {JOURNAL}


@pytest.mark.parametrize(("name", "every"), [("fresh", 6), ("reversible", 9), *POINTS[2:]])
def test_a_finished_file_is_not_written_again(arena: Arena, name: str, every: int, tmp_path: Path) -> None:
    job, at, seen = arena.jobs[name], 0, set()
    while True:
        at += every
        arena.reset(job)
        done = arena.zygote.run(job.argv, Hurt(disk_functions(), at, KILL))
        arena.tally["points killed at"] += done.code == -9
        if arena.judge(job) == "new":
            break
        kept = finished(arena)
        seen.add(len(kept))
        assert written(arena, job.argv, tmp_path / "trace") == job.new.keys() - kept
        assert arena.judge(job) == "new"
    assert max(seen) >= 3  # all shards, in the end


@pytest.mark.parametrize("name", ["fresh", "reversible"])
def test_a_finished_file_that_was_damaged_is_written_again(arena: Arena, name: str) -> None:
    job, damaged, at = arena.jobs[name], 0, 0
    while damaged < 4:
        at += 5
        arena.reset(job)
        arena.zygote.run(job.argv, Hurt(disk_functions(), at, KILL))
        for file in sorted(finished(arena))[:2]:
            path = arena.floor / STAGING / file
            path.write_bytes(path.read_bytes()[:-1] + b"\0\0")
            damaged += 1
        arena.rerun(job)
