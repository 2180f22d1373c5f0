"""kill -9 of an export with slots leaves the old output, the new one or none; of what only reads, it leaves nothing."""

from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
from arena import Arena, Job, tree, write_inputs
from hurts import KILL, Hurt, disk_functions
from zygote import Zygote

EXPORT = """
import torch
from torch import nn
import surgery

torch.manual_seed({seed})
model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2)).eval()
surgery.inject(model, surgery.LoraConfig(r=2, target_modules=["0"], init_lora_weights=False))
try:
    surgery.export_onnx(model, None, {out!r}, inputs=torch.ones(2, 4), swappable=True, overwrite={overwrite})
except surgery.SurgeryError as error:
    raise SystemExit(error.exit_code) from error
"""
ANY = Hurt(disk_functions(), how=KILL)


@pytest.fixture(scope="module")
def exporter(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Zygote]:
    folder = tmp_path_factory.mktemp("warm exports")
    write_inputs(folder)
    with Zygote(folder, EXPORT.format(seed=0, out=str(folder / "onnx"), overwrite=False)) as started:
        yield started


@pytest.mark.parametrize(
    ("overwrite", "every"), [(True, 18), *(pytest.param(one, 1, marks=pytest.mark.slow) for one in (False, True))]
)
def test_an_export_with_slots_that_is_killed_leaves_the_old_the_new_or_none(
    tmp_path: Path, exporter: Zygote, tally: Counter[str], overwrite: bool, every: int
) -> None:
    arena, old = Arena(tmp_path, exporter, tally), None
    arena.clear()
    if overwrite:
        assert exporter.run(["python", EXPORT.format(seed=1, out=str(arena.out), overwrite=False)]).code == 0
        old = tree(arena.out)
    argv = ["python", EXPORT.format(seed=0, out=str(arena.out), overwrite=overwrite)]
    assert exporter.run(argv).code == 0
    job = arena.jobs["export"] = Job(argv, old, tree(arena.out))
    assert {"model.onnx", "model.safetensors", "default.onnx_adapter"} <= job.new.keys()
    assert job.old != job.new
    points = arena.points("export", ANY)
    for at in sorted({*points[::every], points[-1]}):
        arena.reset(job)
        done = exporter.run(argv, ANY._replace(at=at))
        assert (done.code, bool(done.struck)) == (-9, True), done
        tally["points killed at"] += 1
        arena.rerun(job)
    assert len(points) > 15


@pytest.mark.parametrize(
    "words", ["verify MERGED", "verify BASE ADAPTER MERGED", "plan BASE ADAPTER", "diff BASE MERGED"]
)
def test_what_only_reads_writes_nothing_and_may_be_killed_at_any_read(arena: Arena, words: str) -> None:
    paths = {"BASE": arena.base, "ADAPTER": arena.adapter, "MERGED": arena.inputs / "merged"}
    argv = [str(paths.get(word, word)) for word in words.split()]
    arena.clear()
    assert arena.zygote.run(argv, Hurt(disk_functions())).calls == 0
    reads = arena.zygote.run(argv, Hurt(("preadv",))).calls
    for at in sorted({1, reads // 2, reads} - {0}):
        done = arena.zygote.run(argv, Hurt(("preadv",), at, KILL))
        assert (done.code, bool(done.struck)) == (-9, True), done
        arena.tally["points killed at"] += 1
        assert tree(arena.inputs) == arena.before
        assert arena.strays() == set()
    assert reads or words.startswith("plan")
    assert arena.zygote.run(argv).code == 0
