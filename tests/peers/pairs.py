"""Pairs: a model under peft and the same under surgery, and what is asked of both, whatever the method."""

import copy
from collections.abc import Iterable, Sequence
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import surgery

FILE = "model.safetensors"
SLOW = [pytest.mark.slow]


def trained(model: nn.Module, part: float) -> nn.Module:
    """Every trainable tensor moved off its start, by so much of normal numbers; copies of the base's own too."""
    torch.manual_seed(1)
    with torch.no_grad():
        for values in model.parameters():
            if values.requires_grad:
                values.add_(torch.randn_like(values) * part)
    return model.eval()


def forward(model: nn.Module) -> Tensor:
    """What a model of transformers gives for some tokens."""
    return model(torch.arange(12)[None])[0]


def outputs(model: nn.Module) -> Tensor:
    """The same without gradients."""
    with torch.no_grad():
        return forward(model)


def noise(model: nn.Module) -> Tensor:
    """How far its outputs lie from those in float64."""
    return (outputs(model).double() - outputs(copy.deepcopy(model).double())).abs().max()


def within_noise(found: Tensor, wanted: Tensor, floor: Tensor) -> bool:
    """As near as two runs in the dtype are: 8 times as far as one is from the run in float64 of the same weights."""
    return float((found - wanted).abs().max()) <= 8 * float(floor)


def trainable(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Shapes, by the names that peft's wrapper leaves out."""
    found = {name: tuple(values.shape) for name, values in model.named_parameters() if values.requires_grad}
    return {name.removeprefix("base_model.model."): shape for name, shape in found.items()}


def gradients(model: nn.Module) -> dict[str, Tensor]:
    """Those that backward has left, by the same names."""
    found = {name: values.grad for name, values in model.named_parameters() if values.grad is not None}
    return {name.removeprefix("base_model.model."): values for name, values in found.items()}


def saved(model: nn.Module, folder: Path) -> Path:
    """A base as a checkpoint."""
    folder.mkdir()
    save_file({name: values.clone() for name, values in model.state_dict().items()}, folder / FILE)
    return folder


def each_merge(cases: Iterable[str], dtypes: Sequence[torch.dtype]) -> pytest.MarkDecorator:
    """Each case in each dtype; peft's merge and its safe_merge in turns, so that each goes with each of both.

    They are two ways through a layer of peft, whichever dtype and settings it has; the rest is for `make test-all`.
    """
    ways = {"merge": 0, "safe_merge": 1}
    found = [
        pytest.param(case, dtype, bool(safe), id=f"{case}-{dtype}-{way}", marks=[] if (i + j) % 2 == safe else SLOW)
        for i, case in enumerate(cases)
        for j, dtype in enumerate(dtypes)
        for way, safe in ways.items()
    ]
    return pytest.mark.parametrize(("case", "dtype", "safe"), found)


def judge_merge_of_peft(model: nn.Module, theirs: nn.Module, folder: Path, safe: bool) -> None:
    """verify passes what peft merges, and names every tensor that is left as it was, and no other."""
    base, adapter, out = folder / "base", folder / "adapter", folder / "out"
    model.save_pretrained(base)
    theirs.save_pretrained(adapter)
    theirs.merge_and_unload(safe_merge=safe).save_pretrained(out)
    report = surgery.verify_checkpoint(base, adapter, out)
    report.require()
    before, after = load_file(base / FILE), load_file(out / FILE)
    moved = [name for name in before if not torch.equal(before[name], after[name])]
    assert moved
    assert {name for name, one in report.tensors.items() if one.grade != "untouched"} == {*moved}
    forgotten = moved[:: max(1, len(moved) // 3)]  # each is graded by itself
    save_file(after | {name: before[name] for name in forgotten}, out / FILE, {"format": "pt"})
    judged = surgery.verify_checkpoint(base, adapter, out).tensors.items()
    assert {judge for judge, one in judged if one.grade == "different"} == {*forgotten}


def merge_for_transformers(model: nn.Module, theirs: nn.Module, folder: Path, dtype: torch.dtype) -> None:
    """What is merged on files loads in transformers, with the outputs of the live merge to the bit."""
    model.save_pretrained(folder / "base")
    theirs.save_pretrained(folder / "adapter")
    surgery.merge_checkpoint(folder / "base", folder / "adapter", folder / "out")
    read, fresh = (type(model).from_pretrained(folder / one, dtype=dtype).eval() for one in ("base", "out"))
    before = outputs(read)
    live = surgery.merge(surgery.load(read, folder / "adapter"))
    assert torch.equal(outputs(fresh), outputs(live))
    assert not torch.equal(outputs(fresh), before)


def merge_live_and_on_files(base: Path, adapter: Path, ours: nn.Module, folder: Path) -> set[str]:
    """Both give the same bits, and are undone to those of the base; the names of what they change."""
    surgery.merge_checkpoint(base, adapter, folder / "out", reversible=True)
    surgery.verify_checkpoint(base, adapter, folder / "out").require()
    surgery.merge(ours)
    live = surgery.eject(copy.deepcopy(ours), keep_merged=True).state_dict()
    streamed, original = load_file(folder / "out" / FILE), load_file(base / FILE)
    assert live.keys() == streamed.keys() == original.keys()
    assert all(torch.equal(live[name], streamed[name]) for name in live)
    surgery.unmerge_checkpoint(folder / "out", folder / "back")
    assert (folder / "back" / FILE).read_bytes() == (base / FILE).read_bytes()
    back = surgery.eject(ours).state_dict()
    assert all(torch.equal(back[name], original[name]) for name in original)
    return {name for name in live if not torch.equal(live[name], original[name])}
