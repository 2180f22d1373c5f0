"""Arena: the folder in which a command is hurt, and the judgement of what lies there afterwards."""

import json
import shutil
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from checkpoint_folders import INDEX, base_tensors, factors, write_adapter, write_base
from hurts import Hurt
from zygote import Outcome, Zygote

CONFIG = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "dtype": "bfloat16"}
COMMANDS = ("fresh", "overwrite", "reversible", "unmerge")
POINTS = (  # at which a command is hurt: every so many of them
    *(("fresh", 7), ("overwrite", 5)),
    *(pytest.param(name, 1, marks=pytest.mark.slow) for name in COMMANDS),
)
LOCK, STAGING, OLD = ".out.surgery-lock", ".out.surgery-staging", ".out.surgery-old"

LAST = 11

Tree = dict[str, bytes]  # the files below a folder, by path


class Job(NamedTuple):
    """A command, what was in its place before (None: nothing), and what it gives."""

    argv: list[str]
    old: Tree | None
    new: Tree


class Arena:
    """Inputs, and a folder `floor` with nothing but the output `out`."""

    def __init__(self, folder: Path, zygote: Zygote, tally: Counter[str]) -> None:
        self.zygote, self.tally = zygote, tally
        self.inputs, self.floor = folder / "inputs", folder / "floor"
        self.out = self.floor / "out"
        self.base, self.adapter, self.other = (self.inputs / name for name in ("base", "adapter", "other"))
        write_inputs(self.inputs)
        merged = self.inputs / "merged"
        self.clear()
        assert zygote.run(["merge", str(self.base), str(self.adapter), str(merged), "--reversible"]).code == 0
        self.before = tree(self.inputs)
        self.jobs = {name: self._job(name) for name in COMMANDS}

    def argv(self, name: str) -> list[str]:
        merge = ["merge", str(self.base), str(self.adapter), str(self.out)]
        return {
            "fresh": merge,
            "overwrite": [*merge, "--overwrite"],
            "reversible": [*merge, "--reversible"],
            "unmerge": ["unmerge", str(self.inputs / "merged"), str(self.out)],
        }[name]

    def points(self, name: str, hurt: Hurt, every: int = 1) -> list[int]:
        """At which calls a command can be hurt: every so many, and all of the last, where the output is switched."""
        self.reset(self.jobs[name])
        done = self.zygote.run(self.jobs[name].argv, hurt._replace(at=0, lasting=False))
        assert done.code == 0, done
        last = done.calls
        return sorted({*range(every, last + 1, every), *range(max(1, last - LAST), last + 1)})

    def reset(self, job: Job) -> None:
        """The floor as it is before the command."""
        self.clear()
        if job.old is not None:
            lay(job.old, self.out)

    def clear(self) -> None:
        shutil.rmtree(self.floor, ignore_errors=True)
        self.floor.mkdir(parents=True)

    def judge(self, job: Job) -> str:
        """ "old", "new" or "absent": what the output is. Anything else fails, and so do changed inputs."""
        lost = lost_bytes(self.before, tree(self.inputs))
        found = next((tree(one) for one in (self.out, self.floor / OLD) if one.exists()), None)
        whole = found in (job.old, job.new)
        if not whole and job.old is not None:
            lost += lost_bytes(job.old, found or {})
        self.tally["bytes lost"] += lost
        assert lost == 0
        assert whole, f"neither the old output nor the new one: {sorted(found or {})}"
        staged = tree(self.floor / STAGING)
        assert not loads(staged) or weights(staged) in (weights(job.new), weights(job.old or {}))
        return "new" if found == job.new else "absent" if found is None else "old"

    def rerun(self, job: Job) -> None:
        """The same command again gives the same bytes, and nothing is left beside them."""
        was = self.judge(job)
        done = self.zygote.run(job.argv)
        if was == "new" and job.old is None:  # it was all there: a run without --overwrite says so, and tidies nothing
            assert done.code == 6, done
            assert self.strays() <= {LOCK}
        else:
            assert done.code == 0, done
            assert self.strays() == set()
        assert self.judge(job) == "new"

    def strays(self) -> set[str]:
        """What lies beside the output."""
        return {path.name for path in self.floor.iterdir()} - {"out"}

    def _job(self, name: str) -> Job:
        old = None
        self.clear()
        if name == "overwrite":
            self._run(["merge", str(self.base), str(self.other), str(self.out)])
            old = tree(self.out)
        self._run(self.argv(name))
        job = Job(self.argv(name), old, tree(self.out))
        assert job.old != job.new
        return job

    def _run(self, argv: list[str]) -> None:
        done = self.zygote.run(argv)
        assert done.code == 0, done


def write_inputs(folder: Path) -> None:
    """A base in three shards, and two adapters for it."""
    write_base(folder / "base", base_tensors(torch.bfloat16), 3, CONFIG)
    write_adapter(folder / "adapter")
    write_adapter(folder / "other", factors(seed=7))


def told(outcome: Outcome, code: int = 5) -> str:
    """The one line of a failure with this exit code."""
    assert outcome.code == code, outcome
    (line,) = said(outcome.err)
    assert line.startswith("surgery: "), outcome
    assert line.isprintable(), outcome
    return line


def said(err: str) -> list[str]:
    """The lines on stderr; where the machine is slow, a run tells how far it has come, and those are left out."""
    return [line for line in err.splitlines() if not line.endswith(" %")]


def tree(folder: Path) -> Tree:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def lay(files: Mapping[str, bytes], folder: Path) -> None:
    """The files, below a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)


def loads(files: Mapping[str, bytes]) -> bool:
    """Would transformers load it? It wants a config, and one file of weights or all that an index names."""
    if "config.json" not in files:
        return False
    if INDEX not in files:
        return "model.safetensors" in files
    try:
        named = set(json.loads(files[INDEX])["weight_map"].values())
    except ValueError:
        return False
    return named <= files.keys()


def weights(files: Mapping[str, bytes]) -> Tree:
    return {name: data for name, data in files.items() if name.endswith(".safetensors")}


def lost_bytes(before: Mapping[str, bytes], after: Mapping[str, bytes]) -> int:
    """Of the files that are gone or changed."""
    return sum(max(1, len(data)) for name, data in before.items() if after.get(name) != data)
