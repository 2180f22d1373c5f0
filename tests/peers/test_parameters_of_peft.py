"""`target_parameters`: adapters to peft and from it; what runs is what is merged, live and on files; all is undone."""

import json
from pathlib import Path

import peft
import pytest
import torch
from pairs import gradients, merge_live_and_on_files, saved, trainable
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import surgery

TENSORS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class Experts(nn.Module):
    """Two stacks, with a vector between them, and a matrix; where `is_transposed`, stored so."""

    def __init__(self, is_transposed: bool) -> None:
        super().__init__()
        self.is_transposed = is_transposed
        up, down = ((3, 6, 8), (3, 8, 5)) if is_transposed else ((3, 8, 6), (3, 5, 8))
        self.up = nn.Parameter(torch.randn(up) / 3)
        self.shift = nn.Parameter(torch.randn(8) / 3)
        self.down = nn.Parameter(torch.randn(down) / 3)
        self.mix = nn.Parameter(torch.randn(6, 5) / 3)

    def forward(self, x: Tensor) -> Tensor:
        up, down = (self.up.mT, self.down.mT) if self.is_transposed else (self.up, self.down)
        h = torch.einsum("bi,eoi->beo", x, up) + self.shift
        return torch.einsum("beo,eio->bi", h.relu(), down) @ self.mix.T


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(6, 6)
        self.first, self.second = Experts(False), Experts(True)
        self.out = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.second(self.first(self.fc(x))))


FIELDS = {"r": 2, "lora_alpha": 5, "target_modules": ["fc"], "init_lora_weights": False}
FIELDS |= {"target_parameters": ["down", "first.mix", "up", "out.weight"], "rank_pattern": {"first.down": 3}}
HELD = {"first.up", "first.down", "first.mix", "second.up", "second.down", "out.weight"}
CASES = {
    "all": FIELDS,
    "one of a module": FIELDS | {"target_parameters": ["second.down"], "target_modules": [], "rank_pattern": {}},
    "rslora": FIELDS | {"use_rslora": True, "alpha_pattern": {".*up": 3}, "target_modules": None},
}
each_case = pytest.mark.parametrize("fields", CASES.values(), ids=CASES.keys())


def made(dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    return Net().to(dtype).eval()


def given(dtype: torch.dtype = torch.float32) -> Tensor:
    torch.manual_seed(2)
    return torch.randn(4, 6, dtype=dtype)


def by_peft(folder: Path, dtype: torch.dtype = torch.float32, **fields: object) -> peft.PeftModel:
    torch.manual_seed(1)
    theirs = peft.get_peft_model(made(dtype), peft.LoraConfig(**FIELDS | fields)).eval()
    theirs.save_pretrained(folder)
    return theirs


def near(wanted: Tensor, unit: float) -> dict[str, float]:
    """Of six layers, with sums of at most 24 terms of rounded weights, none of which makes its input larger."""
    return {"rtol": 0.0, "atol": 6 * 24 * 4 * unit * float(wanted.detach().abs().max() + 1)}


@each_case
def test_peft_s_files_give_its_outputs_here_and_ours_give_the_same_there(
    fields: dict[str, object], tmp_path: Path
) -> None:
    theirs = by_peft(tmp_path / "theirs", **fields)
    ours, wanted = surgery.load(made(), tmp_path / "theirs"), theirs(given()).detach()
    torch.testing.assert_close(ours(given()), wanted, **near(wanted, torch.finfo(torch.float32).eps))
    assert float((made()(given()) - wanted).detach().abs().max()) > 100 * near(wanted, 2.0**-23)["atol"]
    surgery.save(ours, tmp_path / "ours")
    found, written = (load_file(tmp_path / one / TENSORS) for one in ("ours", "theirs"))
    assert found.keys() == written.keys()
    assert all(torch.equal(found[name], written[name]) for name in written)
    again = peft.PeftModel.from_pretrained(made(), tmp_path / "ours").eval()
    assert torch.equal(again(given()), wanted)


@each_case
def test_a_config_hits_the_same_parameters_with_the_same_names_and_shapes_as_in_peft(fields: dict[str, object]) -> None:
    wanted = trainable(peft.get_peft_model(made(), peft.LoraConfig(**fields)))
    ours = surgery.inject(made(), surgery.LoraConfig(**fields))
    assert trainable(ours) == wanted
    theirs = peft.get_peft_model(made(), peft.LoraConfig(**fields)).state_dict().keys()
    assert ours.state_dict().keys() == {name.removeprefix("base_model.model.") for name in theirs}


def test_gradients_are_those_of_peft(tmp_path: Path) -> None:
    theirs = by_peft(tmp_path)
    ours, found = surgery.load(made(), tmp_path, trainable=True), []
    for model in (theirs, ours):
        model(given()).square().sum().backward()
        found.append(gradients(model))
    assert found[0].keys() == found[1].keys()
    for name, values in found[0].items():
        torch.testing.assert_close(found[1][name], values, **near(values, torch.finfo(torch.float32).eps))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_live_merge_is_that_on_files_to_the_bit_and_both_are_undone(dtype: torch.dtype, tmp_path: Path) -> None:
    by_peft(tmp_path / "adapter", dtype)
    base, ours = saved(made(dtype), tmp_path / "base"), surgery.load(made(dtype), tmp_path / "adapter")
    changed = merge_live_and_on_files(base, tmp_path / "adapter", ours, tmp_path)
    assert changed == HELD | {"fc.weight"}


def test_adapted_is_merged_within_the_rounding_of_the_grid(tmp_path: Path) -> None:
    by_peft(tmp_path)
    ours = surgery.load(made(), tmp_path)
    adapted = ours(given()).detach()
    surgery.merge(ours)
    # The grid of 22 bits costs r * 2^-21 of each product, r at most 3, in place of float32's rounding of it.
    torch.testing.assert_close(ours(given()).detach(), adapted, **near(adapted, 3 * 2.0**-21))


@pytest.mark.parametrize("safe", [False, True], ids=["merge", "safe_merge"])
def test_a_merge_by_peft_passes_verify_and_one_with_the_experts_mixed_up_does_not(safe: bool, tmp_path: Path) -> None:
    theirs, base = by_peft(tmp_path / "adapter"), saved(made(), tmp_path / "base")
    out = saved(theirs.merge_and_unload(safe_merge=safe), tmp_path / "out")
    surgery.verify_checkpoint(base, tmp_path / "adapter", out).require()
    before, after = (load_file(folder / "model.safetensors") for folder in (base, out))
    mixed = before["first.up"] + (after["first.up"] - before["first.up"]).roll(1, 0)
    save_file(after | {"first.up": mixed}, out / "model.safetensors")
    judged = surgery.verify_checkpoint(base, tmp_path / "adapter", out).tensors.items()
    assert [name for name, one in judged if one.grade == "different"] == ["first.up"]


def test_two_adapters_over_other_parameters_of_one_module_keep_to_themselves(tmp_path: Path) -> None:
    ours = surgery.inject(made(), surgery.LoraConfig(r=2, target_parameters=["first.down"]), adapter_name="a")
    surgery.inject(ours, surgery.LoraConfig(**FIELDS), adapter_name="b")
    before = made()(given())
    assert torch.equal(ours(given()), before)  # b is not active, and a is fresh
    surgery.set_adapter(ours, "b")
    surgery.save(ours, tmp_path)
    names = {name.removeprefix("base_model.model.") for name in load_file(tmp_path / "a" / TENSORS)}
    assert names == {"first.lora_A.weight", "first.lora_B.weight"}
    assert json.loads((tmp_path / "a" / CONFIG).read_text())["target_parameters"] == ["first.down"]
    alone = surgery.load(made(), tmp_path / "b")
    assert torch.equal(alone(given()), ours(given()))
    theirs = peft.PeftModel.from_pretrained(made(), tmp_path / "b").eval()
    torch.testing.assert_close(theirs(given()), alone(given()), **near(before, torch.finfo(torch.float32).eps))
