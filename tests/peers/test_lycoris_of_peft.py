"""LoHa and LoKr to peft and from it, over Linear and convolutions: outputs, gradients, files, merges, dropouts."""

import copy
import json
from pathlib import Path
from typing import Any

import peft
import peft.tuners.loha.layer as of_loha
import peft.tuners.lokr.layer as of_lokr
import pytest
import torch
from pairs import each_merge, gradients, merge_live_and_on_files, saved, trainable, trained
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import surgery
from surgery.cli import main
from surgery.methods.lokr import factorized

LAYERS = ("start", "point", "groups", "line", "dot", "head")
KINDS = {"LOHA": (peft.LoHaConfig, surgery.LoHaConfig), "LOKR": (peft.LoKrConfig, surgery.LoKrConfig)}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "loha": ("LOHA", {"r": 4, "alpha": 6}),
    "loha of tucker": ("LOHA", {"r": 3, "alpha": 5, "use_effective_conv2d": True}),
    "loha of patterns": ("LOHA", {"rank_pattern": {"head": 2, "start": 5}, "alpha_pattern": {"line": 3}}),
    "lokr": ("LOKR", {"r": 1, "alpha": 3}),
    "lokr of whole factors": ("LOKR", {"r": 64, "alpha": 50, "decompose_factor": 3}),
    "lokr of tucker": ("LOKR", {"r": 2, "alpha": 5, "decompose_factor": 2, "use_effective_conv2d": True}),
    "lokr of products": ("LOKR", {"r": 1, "decompose_both": True, "decompose_factor": 6}),
}
WEIGHTS = [f"{one}.weight" for one in LAYERS]
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
FILE, MODEL = "adapter_model.safetensors", "model.safetensors"
each_case = pytest.mark.parametrize("case", CASES)
each_kind = pytest.mark.parametrize("kind", KINDS)
TERMS = 6 * 9 + 12 + 4 * 9 + 12 * 3 + 12 + 12  # that the longest sums of the layers have, one after another


class Net(nn.Module):
    """A layer of each sort."""

    def __init__(self) -> None:
        super().__init__()
        self.start = nn.Conv2d(6, 12, 3, stride=2, padding=1)
        self.point = nn.Conv2d(12, 12, 1, bias=False)
        self.groups = nn.Conv2d(12, 12, 3, groups=3, padding="same")
        self.line = nn.Conv1d(12, 12, 3, dilation=2, padding=2)
        self.dot = nn.Conv1d(12, 12, 1)
        self.head = nn.Linear(12, 30)

    def forward(self, x: Tensor) -> Tensor:
        h = self.groups(self.point(self.start(x)).tanh()).tanh()
        found: Tensor = self.head(self.dot(self.line(h.flatten(2)).tanh()).mean(-1))
        return found


def made(dtype: torch.dtype = torch.float32) -> Net:
    torch.manual_seed(0)
    return Net().to(dtype).eval()


def settings(case: str) -> dict[str, Any]:
    return {"target_modules": list(LAYERS), **copy.deepcopy(CASES[case][1])}


def of_peft(case: str) -> Any:
    return KINDS[CASES[case][0]][0](**settings(case))


def by_peft(case: str, model: nn.Module | None = None) -> Any:
    return trained(peft.get_peft_model(made() if model is None else model, of_peft(case)), 1 / 4)


def outputs(model: nn.Module) -> Tensor:
    torch.manual_seed(2)
    return model(torch.randn(5, 6, 9, 9))


def close(one: Tensor, other: Tensor) -> bool:
    """Each layer sums up to so many terms, in whatever order, and passes on what the one before it is off by."""
    room = 2 * TERMS * torch.finfo(one.dtype).eps * float(one.abs().max().maximum(other.abs().max()))
    return bool((one - other).abs().max() <= room)


@each_case
def test_what_peft_saves_gives_its_outputs_here_and_back_again(case: str, tmp_path: Path) -> None:
    before, theirs = outputs(made()), by_peft(case)
    theirs.save_pretrained(tmp_path / "theirs")
    ours = surgery.load(made(), tmp_path / "theirs")
    assert close(outputs(ours), outputs(theirs))
    assert not close(outputs(ours), before)
    surgery.save(ours, tmp_path / "ours")
    again = peft.PeftModel.from_pretrained(made(), tmp_path / "ours").eval()
    assert torch.equal(outputs(again), outputs(theirs))
    found, wanted = (load_file(tmp_path / one / FILE) for one in ("ours", "theirs"))
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


@each_case
def test_a_config_hits_the_same_modules_with_the_same_shapes_as_in_peft(case: str) -> None:
    wanted = trainable(peft.get_peft_model(made(), of_peft(case)))
    assert trainable(surgery.inject(made(), of_peft(case))) == wanted


@each_case
def test_gradients_are_those_of_peft(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(of_loha, "make_weight_cp", tucker)  # whose own are wrong, see test_lycoris_beside_peft
    theirs = by_peft(case)
    theirs.save_pretrained(tmp_path)
    ours, found = surgery.load(made(), tmp_path, trainable=True), []
    for model in (theirs, ours):
        outputs(model).square().sum().backward()
        found.append(gradients(model))
    assert found[0].keys() == found[1].keys()
    for name, wanted in found[0].items():
        assert bool(wanted.any())
        # Forth and back, over 5 inputs of up to 25 places, with products of both factors.
        room = 8 * (TERMS + 5 * 25) * torch.finfo(torch.float32).eps * float(wanted.abs().max())
        assert float((found[1][name] - wanted).abs().max()) <= room


def tucker(*given: Tensor, scale: Tensor) -> Tensor:
    """As peft's `make_weight_cp`, with torch's own gradients."""
    first, second = (torch.einsum("i j k l, j r, i p -> p r k l", t, b, a) for t, a, b in (given[:3], given[3:]))
    return first * second * scale


@each_kind
def test_every_field_that_peft_writes_is_read_and_written_again(kind: str, tmp_path: Path) -> None:
    theirs, ours = KINDS[kind]
    theirs().save_pretrained(tmp_path)
    written = json.loads((tmp_path / "adapter_config.json").read_text())
    assert ours().to_json() == written
    assert ours.from_json(written) == ours()


@each_merge(CASES, DTYPES)
def test_a_merge_by_peft_passes_verify_and_one_that_forgot_a_tensor_does_not(
    case: str, dtype: torch.dtype, safe: bool, tmp_path: Path
) -> None:
    model = made(dtype)
    base, theirs = saved(model, tmp_path / "base"), by_peft(case, model)
    theirs.save_pretrained(tmp_path / "adapter")
    out = saved(theirs.merge_and_unload(safe_merge=safe), tmp_path / "out")
    surgery.verify_checkpoint(base, tmp_path / "adapter", out).require()
    before, after = (load_file(folder / MODEL) for folder in (base, out))
    save_file(after | {one: before[one] for one in WEIGHTS}, out / MODEL)  # each is graded by itself
    judged = surgery.verify_checkpoint(base, tmp_path / "adapter", out).tensors.items()
    assert {name for name, judge in judged if judge.grade == "different"} == {*WEIGHTS}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@each_case
def test_a_live_merge_and_one_of_files_have_the_same_bits_and_come_back(
    case: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    base = saved(made(dtype), tmp_path / "base")
    by_peft(case, made(dtype)).save_pretrained(tmp_path / "adapter")
    ours = surgery.load(made(dtype), tmp_path / "adapter")
    changed = merge_live_and_on_files(base, tmp_path / "adapter", ours, tmp_path)
    assert changed == {*WEIGHTS}


@each_case
def test_the_command_line_merges_verifies_and_unmerges_it(
    case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = saved(made(), tmp_path / "base")
    by_peft(case).save_pretrained(tmp_path / "adapter")
    given = [str(base), f"{tmp_path / 'adapter'}=0.5"]
    out, back = str(tmp_path / "out"), str(tmp_path / "back")
    calls = (
        ["inspect", str(tmp_path / "adapter")],
        ["plan", *given],
        ["merge", *given, out, "--reversible"],
        ["verify", *given, out],
        ["unmerge", out, back],
    )
    for call in calls:
        with pytest.raises(SystemExit) as ended:
            main(call)
        assert not ended.value.code, capsys.readouterr().err
    assert (Path(back) / MODEL).read_bytes() == (base / MODEL).read_bytes()
    assert {"LOHA": "LoHa", "LOKR": "LoKr"}[CASES[case][0]] in capsys.readouterr().out


@pytest.mark.parametrize("layer", [nn.Linear(12, 30), nn.Conv2d(12, 30, 3)], ids=["Linear", "Conv2d"])
@each_case
def test_dropouts_leave_out_what_they_do_in_peft(case: str, layer: nn.Module) -> None:
    """With the seed that peft had, once its layer has drawn whether it runs at all."""
    # A scaling that float32 holds, since peft rounds that of LoHa to it.
    dropped = {"target_modules": ["0"], "rank_dropout": 0.4, "module_dropout": 0.3, "r": 4, "alpha": 6}
    theirs, ours = KINDS[CASES[case][0]]
    fields = {name: value for name, value in settings(case).items() if not name.endswith("_pattern")} | dropped
    net = nn.Sequential(copy.deepcopy(layer)).double()
    other = trained(peft.get_peft_model(copy.deepcopy(net), theirs(**fields)), 1).double().train()
    model = surgery.inject(net, ours(**fields)).double().train()
    model.load_state_dict({name.removeprefix("base_model.model."): v for name, v in other.state_dict().items()})
    x, seen = torch.randn(7, 12, *layer.weight.shape[2:]).double(), set()
    for seed in range(12):
        found = []
        for one in (model, other):
            torch.manual_seed(seed)
            found.append(one(x).detach())
        assert float((found[0] - found[1]).abs().max()) <= 2 * 12 * 9 * 2.0**-52 * float(found[1].abs().max())
        seen.add(torch.equal(found[0], model[0].base_layer(x)))
    assert seen == {True, False}
    assert not torch.equal(model.eval()(x), found[0])


def test_numbers_are_factored_as_in_peft() -> None:
    for size in range(1, 200):
        for divisor in (-2, -1, 0, 1, 2, 3, 4, 8, 12, 50, 1000):
            assert factorized(size, divisor) == of_lokr.factorization(size, divisor)


@each_kind
def test_what_peft_does_not_adapt_is_refused_by_name(kind: str) -> None:
    theirs, ours = KINDS[kind]
    for layer in (Conv1D(3, 4), nn.Embedding(3, 4), nn.Conv3d(2, 3, 1)):
        with pytest.raises(TypeError, match="not supported"):
            peft.get_peft_model(nn.Sequential(layer), theirs(target_modules=["0"]))
        with pytest.raises(surgery.MatchError, match=r"^0: its op is .* acts on Linear, Conv1d and Conv2d, as in PEFT"):
            surgery.inject(nn.Sequential(layer), ours(target_modules=["0"]))


@each_case
def test_tensors_that_are_missing_or_too_many_are_refused_live_and_on_files(case: str, tmp_path: Path) -> None:
    base = saved(made(), tmp_path / "base")
    by_peft(case).save_pretrained(tmp_path / "adapter")
    tensors = load_file(tmp_path / "adapter" / FILE)
    wanted = {one.rpartition(".")[2] for one in tensors}
    gone = sorted(name for name in tensors if ".start." in name)
    more = next((one for one in ("hada_t1", "lokr_t2") if one[:4] in next(iter(wanted))), "")
    changes = [{name: value for name, value in tensors.items() if name != one} for one in gone]
    for changed in [*changes, tensors | {f"base_model.model.head.{more}": torch.ones(4, 4, 1, 1)}]:
        save_file(changed, tmp_path / "adapter" / FILE)
        for call in (
            lambda: surgery.load(made(), tmp_path / "adapter"),
            lambda: surgery.merge_checkpoint(base, tmp_path / "adapter", tmp_path / "out"),
        ):
            with pytest.raises((surgery.FormatError, surgery.ShapeError), match=r"start|head"):
                call()
