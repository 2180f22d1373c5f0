"""RoAd to peft and from it: outputs, gradients, files and merges; and where peft's own are wrong."""

import copy
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from pairs import (
    FILE,
    gradients,
    judge_merge_of_peft,
    merge_live_and_on_files,
    noise,
    outputs,
    saved,
    trainable,
    trained,
    within_noise,
)
from safetensors.torch import load_file
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import surgery
from surgery.cli import main
from surgery.errors import ConfigError, MatchError, ValueRangeError

SMALL = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 99}
TARGETS: dict[str, Any] = {"target_modules": ["q_proj", "down_proj"], "group_size": 16}
CASES: Mapping[str, dict[str, Any]] = {
    "road_1": {"variant": "road_1"},
    "road_2": {"variant": "road_2", "group_size": 2},
    "road_4": {"variant": "road_4"},
}
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
each_case = pytest.mark.parametrize("case", CASES)
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def made(dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SMALL, attention_bias=True)).eval()
    with torch.no_grad():
        for name, values in model.named_parameters():
            if name.endswith("q_proj.bias"):
                values.normal_()
    return model.to(dtype)


def config(case: str, **fields: Any) -> peft.RoadConfig:
    return peft.RoadConfig(**TARGETS | CASES[case] | fields)


def by_peft(model: nn.Module, case: str, **fields: Any) -> peft.PeftModel:
    return trained(peft.get_peft_model(copy.deepcopy(model), config(case, **fields)), 0.8)


@each_dtype
@each_case
def test_what_peft_saves_gives_equal_outputs_here_and_back_again(case: str, dtype: torch.dtype, tmp_path: Path) -> None:
    model = made(dtype)
    before, theirs = outputs(model), by_peft(model, case)
    wanted = outputs(theirs)
    theirs.save_pretrained(tmp_path / "theirs")
    ours = surgery.load(copy.deepcopy(model), tmp_path / "theirs")
    floor = noise(model)
    assert within_noise(outputs(ours), wanted, floor)
    assert not within_noise(outputs(ours), before, floor)
    surgery.save(ours, tmp_path / "ours")
    found, told = (load_file(tmp_path / one / "adapter_model.safetensors") for one in ("ours", "theirs"))
    assert found.keys() == told.keys()
    assert all(torch.equal(found[name], told[name]) for name in found)
    again = peft.PeftModel.from_pretrained(model, tmp_path / "ours").eval()
    assert within_noise(outputs(again), wanted, floor)


@each_case
def test_a_config_hits_the_same_modules_with_the_same_shapes_and_changes_nothing(case: str) -> None:
    wanted = trainable(peft.get_peft_model(made(), config(case)))
    ours = surgery.inject(made(), config(case))
    assert trainable(ours) == wanted
    assert torch.equal(outputs(ours), outputs(made()))
    random = surgery.inject(made(), config(case, init_weights=False))
    for role, mean in {"theta": 0.0, "alpha": 1.0}.items():
        held = torch.cat([values.detach() for name, values in random.named_parameters() if f"road_{role}" in name])
        assert abs(float(held.mean()) - mean) < 4 * 0.5 / len(held) ** 0.5  # four errors of a mean
        assert abs(float(held.std()) - 0.5) < 4 * 0.5 / (2 * len(held)) ** 0.5  # and of a deviation


@each_case
def test_training_goes_as_in_peft(case: str) -> None:
    """Of three steps; each gradient is off by roundings of sums alone."""
    theirs = peft.get_peft_model(made(), config(case)).train()
    ours = surgery.inject(made(), config(case)).train()
    for _ in range(3):
        found = []
        for model in (theirs, ours):
            optimizer = torch.optim.SGD([one for one in model.parameters() if one.requires_grad], lr=1e-3)
            optimizer.zero_grad()
            model(torch.arange(12)[None])[0].square().sum().backward()
            optimizer.step()
            found.append(gradients(model))
        assert found[0].keys() == found[1].keys()
        for name, wanted in found[0].items():
            assert bool(wanted.any())
            assert float((found[1][name] - wanted).norm()) <= 2**-12 * float(wanted.norm())  # float32 has 2^-24


def test_every_field_that_peft_writes_is_read_and_written_again(tmp_path: Path) -> None:
    peft.RoadConfig().save_pretrained(tmp_path)
    written = json.loads((tmp_path / "adapter_config.json").read_text())
    assert surgery.RoadConfig().to_json() == written
    assert surgery.RoadConfig.from_json(written) == surgery.RoadConfig()


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"variant": "road_3"}, "variant is 'road_3'; one of 'road_1', 'road_2', 'road_4' is wanted"),
        ({"group_size": 3}, "group_size is 3; an even number is wanted"),
        ({"group_size": 0}, "group_size is 0"),
    ],
)
def test_a_value_that_cannot_be_is_refused_by_name(fields: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        surgery.RoadConfig(**fields)


def test_groups_that_do_not_fit_are_refused() -> None:
    with pytest.raises(MatchError, match="0: group_size is 64, of which its 96 outputs are no multiple"):
        surgery.inject(nn.Sequential(nn.Linear(4, 96)), surgery.RoadConfig(target_modules=["0"]))


@pytest.mark.parametrize("safe", [False, True], ids=["merge", "safe_merge"])
@each_dtype
@each_case
def test_a_merge_by_peft_passes_verify_and_one_that_forgot_a_tensor_does_not(
    case: str, dtype: torch.dtype, safe: bool, tmp_path: Path
) -> None:
    """Biases are turned too."""
    model = made(dtype)
    judge_merge_of_peft(model, by_peft(model, case), tmp_path, safe)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@each_case
def test_what_is_merged_in_tiles_of_whole_groups_is_the_live_merge_and_comes_back(
    case: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    """Of 1,000 inputs a tile of 2^19 elements has 524 rows, which are no whole groups of 40."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(1000, 1200)).to(dtype)
    theirs = by_peft(model, case, target_modules=["0"], group_size=40)
    theirs.save_pretrained(tmp_path / "adapter")
    ours = surgery.load(copy.deepcopy(model), tmp_path / "adapter")
    changed = merge_live_and_on_files(saved(model, tmp_path / "base"), tmp_path / "adapter", ours, tmp_path)
    assert changed == {"0.weight", "0.bias"}
    told = surgery.plan(tmp_path / "base", tmp_path / "adapter")
    assert [one["undo"] for one in told.to_json()["changes"]] == ["copy", "copy"]


@pytest.mark.parametrize("form", ["nf4", "int8", "w4a16", "fp8_dynamic"])
def test_a_merge_into_a_format_is_of_whole_groups_too(form: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(1024, 1280)).bfloat16()
    by_peft(model, "road_4", target_modules=["0"], group_size=40).save_pretrained(tmp_path / "adapter")
    base = saved(model, tmp_path / "base")
    surgery.merge_checkpoint(base, tmp_path / "adapter", tmp_path / "out", into=form, reversible=True)
    report = surgery.verify_checkpoint(base, tmp_path / "adapter", tmp_path / "out")
    assert {one.grade for one in report.tensors.values()} == {"bits"}
    surgery.unmerge_checkpoint(tmp_path / "out", tmp_path / "back")
    assert (tmp_path / "back" / FILE).read_bytes() == (base / FILE).read_bytes()


def test_an_angle_beyond_what_is_told_is_refused_by_its_layer(tmp_path: Path) -> None:
    model = made()
    theirs = by_peft(model, "road_2")
    with torch.no_grad():
        next(values for name, values in theirs.named_parameters() if "road_theta" in name)[3] = 2.0**21
    theirs.save_pretrained(tmp_path / "adapter")
    with pytest.raises(ValueRangeError, match=r"layers\.0.*: an angle is NaN, or beyond 2\^20 radians"):
        surgery.merge(surgery.load(model, tmp_path / "adapter"))


def run(*words: object) -> int:
    """A command's exit code."""
    with pytest.raises(SystemExit) as ended:
        main([str(word) for word in words])
    return int(ended.value.code or 0)


def test_it_is_merged_and_checked_on_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = made()
    base, adapter, out, half, back = (tmp_path / one for one in ("base", "adapter", "out", "half", "back"))
    model.save_pretrained(base)
    by_peft(model, "road_4").save_pretrained(adapter)
    for words, told in {
        ("inspect", adapter): "RoAd",
        ("plan", base, adapter): "makes each element of several others",
        ("merge", base, adapter, out, "--reversible"): "",
        ("verify", base, adapter, out): "bits",
        ("unmerge", out, back): "",
        ("merge", base, f"{adapter}=0.5", half): "",
        ("verify", base, f"{adapter}=0.5", half): "bits",
    }.items():
        assert run(*words) == 0
        assert told in capsys.readouterr().out
    assert (back / FILE).read_bytes() == (base / FILE).read_bytes()
    begun, whole, middle = (load_file(one / FILE) for one in (base, out, half))
    moved = [name for name in begun if not torch.equal(whole[name], begun[name])]
    assert {name.rpartition(".")[2] for name in moved} == {"weight", "bias"}
    for name in moved:  # the middle of two numbers, of which each is rounded, is
        wanted = (whole[name].double() + begun[name].double()) / 2
        size = float(whole[name].abs().max() + begun[name].abs().max())
        assert float((middle[name].double() - wanted).abs().max()) <= 2**-23 * size
