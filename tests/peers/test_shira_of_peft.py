"""SHiRA to peft and from it: outputs, gradients, files with their indices, merges, and masks made by code."""

import copy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from click.testing import CliRunner
from pairs import each_merge, judge_merge_of_peft, outputs, trained
from placed_pairs import (
    DTYPES,
    TARGETS,
    by_peft,
    check_fields,
    check_files,
    check_fresh,
    check_gradients,
    check_streaming,
    made,
    near,
)
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import surgery
from surgery.cli import surgery as command
from surgery.methods.sparse import Sparse, _sampled

PART = 1 / 2
CASES: dict[str, dict[str, Any]] = {
    "random": {"r": 4},
    "seeded": {"r": 8, "random_seed": 7},
    "drawn": {"r": 2, "init_weights": False},
    "output head": {"r": 4, "modules_to_save": ["lm_head"]},
}
FILE = "adapter_model.safetensors"
each_case = pytest.mark.parametrize("case", CASES)
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def config(case: str) -> peft.ShiraConfig:
    return peft.ShiraConfig(**{"target_modules": TARGETS} | copy.deepcopy(CASES[case]))


@each_dtype
@each_case
def test_what_peft_saves_gives_its_outputs_here_and_back_again(case: str, dtype: torch.dtype, tmp_path: Path) -> None:
    check_files(config(case), dtype, PART, tmp_path)
    assert {values.dtype for name, values in load_file(tmp_path / "ours" / FILE).items() if "indices" in name} == {
        torch.int32
    }


@each_case
def test_a_config_hits_the_same_modules_with_the_same_shapes_and_places_as_in_peft(case: str, tmp_path: Path) -> None:
    check_fresh(config(case))
    for name, model in (
        ("theirs", peft.get_peft_model(made(), config(case))),
        ("ours", surgery.inject(made(), config(case))),
    ):
        model.save_pretrained(tmp_path / name) if name == "theirs" else surgery.save(model, tmp_path / name)
    theirs, ours = (load_file(tmp_path / one / FILE) for one in ("theirs", "ours"))
    assert theirs.keys() == ours.keys()
    assert all(torch.equal(ours[name], values) for name, values in theirs.items() if "indices" in name)


@each_case
def test_gradients_are_those_of_peft(case: str, tmp_path: Path) -> None:
    check_gradients(config(case), PART, tmp_path)


def test_every_field_that_peft_writes_is_read_and_written_again(tmp_path: Path) -> None:
    check_fields(peft.ShiraConfig(), surgery.ShiraConfig(), tmp_path)


@each_merge(["random", "output head"], DTYPES)
def test_a_merge_by_peft_passes_verify_and_one_that_forgot_a_tensor_does_not(
    case: str, dtype: torch.dtype, safe: bool, tmp_path: Path
) -> None:
    model = made(dtype)
    judge_merge_of_peft(model, by_peft(model, config(case), PART), tmp_path, safe)


@each_dtype
def test_a_merge_of_files_is_the_live_one_and_both_come_back_to_the_bit(dtype: torch.dtype, tmp_path: Path) -> None:
    check_streaming(config("random"), dtype, PART, tmp_path)


def test_the_command_line_merges_verifies_and_unmerges_at_half_the_strength(tmp_path: Path) -> None:
    def run(*given: object) -> str:
        done = CliRunner().invoke(command, [str(one) for one in given])
        assert done.exit_code == 0, done.output
        return done.output

    base, adapter, out, back = (tmp_path / one for one in ("base", "adapter", "out", "back"))
    made().save_pretrained(base)
    by_peft(made(), config("random"), PART).save_pretrained(adapter)
    assert "SHiRA" in run("inspect", adapter)
    assert "SHiRA" in run("plan", base, f"{adapter}=0.5")
    run("merge", base, f"{adapter}=0.5", out, "--reversible")
    run("verify", base, f"{adapter}=0.5", out)
    assert not surgery.verify_checkpoint(base, adapter, out).ok
    run("unmerge", out, back)
    assert (back / "model.safetensors").read_bytes() == (base / "model.safetensors").read_bytes()


def mine(layer: nn.Module, r: int, **_: Any) -> Tensor:
    """The first numbers of the weight."""
    mask = torch.zeros_like(layer.weight)
    mask.view(-1)[: r * sum(mask.shape)] = 1
    return mask


def test_places_that_peft_was_given_by_code_are_read_from_its_files_and_refused_elsewhere(tmp_path: Path) -> None:
    for kind in ("mine", "random"):  # peft takes the function in either case
        theirs = peft.ShiraConfig(r=2, target_modules=TARGETS, mask_type=kind)
        theirs.mask_fn = mine
        with pytest.raises(surgery.ConfigError, match="mask_fn; make the adapter in PEFT"):
            surgery.inject(made(), theirs)
    theirs.mask_type = "mine"
    model = trained(peft.get_peft_model(made(), theirs), PART)
    model.save_pretrained(tmp_path / "theirs")
    ours = surgery.load(made(), tmp_path / "theirs")
    assert near(outputs(ours), outputs(model), torch.float32)
    surgery.save(ours, tmp_path / "ours")
    found, wanted = (load_file(tmp_path / one / FILE) for one in ("ours", "theirs"))
    assert all(torch.equal(found[name], values) for name, values in wanted.items())


def test_indices_that_peft_wrote_on_windows_as_floats_are_read(tmp_path: Path) -> None:
    model = by_peft(made(), config("random"), PART)
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / FILE)
    save_file({name: values.float() for name, values in tensors.items()}, tmp_path / FILE)
    assert near(outputs(surgery.load(made(), tmp_path)), outputs(model), torch.float32)


@pytest.mark.parametrize(
    ("row", "column", "told"),
    [(32, 0, "beyond"), (-1, 0, "beyond"), (0, 32, "beyond"), (0, -1, "beyond"), (None, None, "an index twice")],
)
def test_indices_that_mean_nothing_are_refused_live_and_on_files(
    row: int | None, column: int | None, told: str, tmp_path: Path
) -> None:
    made().save_pretrained(tmp_path / "base")
    by_peft(made(), config("random"), PART).save_pretrained(tmp_path / "adapter")
    tensors = load_file(tmp_path / "adapter" / FILE)
    name = next(name for name in tensors if "q_proj.shira_indices" in name)
    tensors[name][:, 0] = tensors[name][:, 1] if row is None else torch.tensor([row, column])
    save_file(tensors, tmp_path / "adapter" / FILE)
    with pytest.raises(surgery.ValueRangeError, match=f"q_proj: shira_indices holds .*{told}"):
        surgery.load(made(), tmp_path / "adapter")
    with pytest.raises(surgery.ValueRangeError, match=f"q_proj: shira_indices holds .*{told}"):
        surgery.merge_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")


def test_what_does_not_fit_a_layer_is_refused_and_nothing_changes() -> None:
    def refused(told: str, layer: nn.Module, r: int) -> None:
        model = nn.Sequential(layer)
        with pytest.raises(surgery.MatchError, match=f"^0: .*{told}"):
            surgery.inject(model, surgery.ShiraConfig(target_modules=["0"], r=r))
        assert model[0] is layer

    refused("r is 4, which is 56 numbers, and its weight has 48", nn.Linear(6, 8), 4)
    refused("its op is embedding; SHiRA acts on Linear", nn.Embedding(6, 8), 2)
    for field in ({"r": 0}, {"mask_type": None}, {"random_seed": -1}, {"random_seed": 1.5}):
        with pytest.raises(surgery.ConfigError, match=f"^{next(iter(field))} is "):
            surgery.ShiraConfig(**field)


def test_its_step_has_the_gradients_of_the_plain_operations_twice() -> None:
    torch.manual_seed(0)
    x, W, bias, v = (torch.randn(*shape).double().requires_grad_() for shape in ((3, 2, 5), (4, 5), (4,), (6,)))
    at = torch.tensor([0, 4, 7, 12, 16, 18])
    assert torch.autograd.gradcheck(lambda *given: Sparse.apply(*given, at, (4, 5)), (x, W, bias, v))
    assert torch.autograd.gradgradcheck(lambda x, v: Sparse.apply(x, None, None, v, at, (4, 5)), (x, v))


def test_the_gradient_of_a_large_weight_is_taken_by_blocks_of_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    left, right = (torch.randint(-9, 10, shape).float() for shape in ((7, 23), (7, 5)))
    flat = torch.randperm(23 * 5)[:60]
    whole = (left.T @ right).flatten()[flat]
    for numbers in (1, 11, 1000):
        monkeypatch.setattr("surgery.methods.sparse._NUMBERS", numbers)
        assert torch.equal(_sampled(left, right, flat), whole)


def test_over_miss_and_under_lora_it_adds_to_what_they_make() -> None:
    model = surgery.inject(made(), surgery.MissConfig(r=8, target_modules=["q_proj"]), adapter_name="miss")
    surgery.inject(model, config("random"), adapter_name="shira")
    surgery.inject(model, surgery.LoraConfig(r=2, target_modules=["q_proj"]), adapter_name="lora")
    surgery.set_adapter(model, ["miss", "shira", "lora"])
    adapted = outputs(trained(model, 1 / 4))
    assert not near(adapted, outputs(made()), torch.float32)
    assert near(outputs(surgery.merge(model)), adapted, torch.float32)
    assert torch.equal(outputs(surgery.eject(model)), outputs(made()))
