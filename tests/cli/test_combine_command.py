"""surgery combine: its table and report, and what it refuses, each leaving no output."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import pytest
import torch
from outcomes import Run, parsed, rows, told
from safetensors.torch import load_file, save_file

import surgery
from surgery.cli.combine import combine
from surgery.procedures.making.combinations import COMBINATIONS


def test_an_adapter_halved_twice_is_itself(run: Run, adapter: Path, tmp_path: Path) -> None:
    found = run("combine", f"{adapter}=0.5", f"{adapter}=0.5", tmp_path / "out", "--report", tmp_path / "report.xml")
    assert (found.code, found.err) == (0, "")
    assert all(cells[1] == "cat" and float(cells[3]) <= torch.finfo(torch.float32).eps for cells in rows(found)[:-1])
    assert (tmp_path / "report.xml").is_file()
    again = run("combine", adapter, tmp_path / "out", "--overwrite", "--json", "--method", "svd")
    data = parsed(again)
    assert data == surgery.combine(adapter, tmp_path / "out", method="svd", overwrite=True).to_json()
    assert data["reproducible"] is False


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--method", "ties"], "--density: none is given"),
        (["--method", "ties", "--density", "0"], "above 0 and at most 1"),
        (["--method", "dare_linear", "--density", "0.5", "--seed", "-1"], "from 0 to 9223372036854775807"),
        (["--density", "0.5"], "--density: the method cat has none"),
        (["--rank", "2"], "--rank: the method cat has none"),
        (["--method", "svd", "--rank", "0"], "1 or more is wanted"),
        (["--method", "svd", "--seed", "1"], "--seed: the method svd has none"),
        (
            ["--method", "linear", "--majority-sign-method", "total"],
            "--majority-sign-method: the method linear has none",
        ),
    ],
)
def test_a_setting_that_cannot_be_is_code_2(
    options: list[str], words: str, run: Run, adapter: Path, tmp_path: Path
) -> None:
    assert words in told(run("combine", adapter, tmp_path / "out", *options), 2)
    assert not (tmp_path / "out").exists()


def test_the_command_offers_every_method() -> None:
    offered = next(one for one in combine.params if one.name == "method").type
    assert isinstance(offered, click.Choice)
    assert list(offered.choices) == list(COMBINATIONS)


@pytest.mark.parametrize("method", ["cat", "svd"])
@pytest.mark.parametrize("weight", ["1e300", "1e60"])
def test_a_weight_whose_outcome_overflows_is_code_3(
    weight: str, method: str, run: Run, adapter: Path, tmp_path: Path
) -> None:
    found = told(run("combine", f"{adapter}={weight}", tmp_path / "out", "--method", method), 3)
    assert "overflows" in found
    assert not (tmp_path / "out").exists()


def test_a_name_that_ends_as_another_keeps_its_own_rank(run: Run, tmp_path: Path) -> None:
    model = torch.nn.ModuleDict({"a": torch.nn.Linear(4, 4), "z": torch.nn.ModuleDict({"a": torch.nn.Linear(4, 4)})})
    for name, targets in (("one", ["a"]), ("two", ["z.a"])):
        config = surgery.LoraConfig(r=2, target_modules=targets, init_lora_weights=False)
        surgery.save(surgery.inject(model, config), tmp_path / name)
        surgery.eject(model)
    data = parsed(run("combine", tmp_path / "one", tmp_path / "two", tmp_path / "two", tmp_path / "out", "--json"))
    assert {name: one["r"] for name, one in data["sites"].items()} == {"a": 2, "z.a": 6}
    held = surgery.LoraConfig.from_pretrained(tmp_path / "out")
    assert [(held.method(name).r, held.method(name).scaling) for name in ("a", "z.a")] == [(2, 1.0), (6, 1.0)]


def config(change: dict[str, object]) -> Callable[[Path], None]:
    def change_it(folder: Path) -> None:
        path = folder / "adapter_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | change))

    return change_it


def tensors(change: Callable[[dict[str, torch.Tensor]], None]) -> Callable[[Path], None]:
    def change_it(folder: Path) -> None:
        held = load_file(folder / "adapter_model.safetensors")
        change(held)
        save_file(held, folder / "adapter_model.safetensors")

    return change_it


def cut(held: dict[str, torch.Tensor]) -> None:
    key = next(key for key in sorted(held) if "lora_B" in key)
    held[key] = held[key][1:].contiguous()


def spoil(held: dict[str, torch.Tensor]) -> None:
    held[next(key for key in held if "lora_A" in key)][0, 0] = float("nan")


def rename(held: dict[str, torch.Tensor], before: str, after: str) -> None:
    for key in list(held):
        held[after + key.removeprefix(before)] = held.pop(key)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (config({"fan_in_fan_out": True}), "fan_in_fan_out is not the same"),
        (tensors(cut), "one base is wanted"),
        (tensors(spoil), "A holds NaN or infinity"),
        (tensors(lambda held: rename(held, "base_model.model.model.", "base_model.model.")), "by another prefix"),
    ],
)
def test_adapters_that_contradict_each_other_are_code_3(
    change: Callable[[Path], None], words: str, run: Run, adapter: Path, tmp_path: Path
) -> None:
    other = tmp_path / "other"
    shutil.copytree(adapter, other)
    change(other)
    assert words in told(run("combine", adapter, other, tmp_path / "out"), 3)
    assert not (tmp_path / "out").exists()


def test_another_type_of_adapter_is_refused_by_name(run: Run, tmp_path: Path) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(4, 4))
    surgery.save(surgery.inject(model, surgery.IA3Config(target_modules=["0"], feedforward_modules=[])), tmp_path / "a")
    assert "peft_type is IA3; combine takes LORA" in told(run("combine", tmp_path / "a", tmp_path / "out"), 3)


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("use_dora", True),
        ("lora_bias", True),
        ("bias", "all"),
        ("bias", "lora_only"),
        ("use_bdlora", {"nblocks": 2, "target_modules_bd_a": ["0"]}),
        ("trainable_token_indices", {"1": [2]}),
    ],
)
def test_what_a_sum_of_two_factors_leaves_out_is_refused_by_name(
    setting: str, value: object, run: Run, tmp_path: Path
) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Embedding(4, 4))
    config: Any = surgery.LoraConfig(r=2, target_modules=["0"], **{setting: value})  # type: ignore[arg-type]
    surgery.save(surgery.inject(model, config), tmp_path / "a")
    assert f"it has {setting}, which a sum" in told(run("combine", tmp_path / "a", tmp_path / "out"), 3)
    assert not (tmp_path / "out").exists()


def test_a_task_that_only_some_configs_tell_is_that_of_all(run: Run, adapter: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(adapter, other)
    config({"task_type": "CAUSAL_LM"})(other)
    assert run("combine", adapter, other, tmp_path / "out").code == 0
    assert json.loads((tmp_path / "out/adapter_config.json").read_text())["task_type"] == "CAUSAL_LM"
    config({"task_type": "SEQ_CLS"})(adapter)
    assert "task_type is not the same" in told(run("combine", adapter, other, tmp_path / "x"), 3)


@pytest.mark.parametrize(("weights", "code"), [((0.5, 0.5), 0), ((1, 1), 0), ((0.5, 1), 3), ((0.5, 0.25), 3)])
def test_a_saved_module_is_taken_whole_or_refused(
    weights: tuple[float, float], code: int, run: Run, tmp_path: Path
) -> None:
    for name in "ab":
        torch.manual_seed(0)
        model = torch.nn.ModuleDict({"body": torch.nn.Linear(4, 4), "head": torch.nn.Linear(4, 2)})
        config = surgery.LoraConfig(r=2, target_modules=["body"], modules_to_save=["head"])
        surgery.save(surgery.inject(model, config), tmp_path / name)
    given = [f"{tmp_path / name}={weight}" for name, weight in zip("ab", weights, strict=True)]
    done = run("combine", *given, tmp_path / "out")
    assert done.code == code
    assert ("head.bias: modules_to_save replaces it" in done.err) == (code == 3)


def test_a_saved_module_in_two_adapters_must_be_the_same(run: Run, tmp_path: Path) -> None:
    for name, bias in (("a", 0.0), ("b", 0.0), ("c", 1.0)):
        torch.manual_seed(0)
        model = torch.nn.ModuleDict({"body": torch.nn.Linear(4, 4), "head": torch.nn.Linear(4, 2)})
        torch.nn.init.constant_(model["head"].bias, bias)
        config = surgery.LoraConfig(r=2, target_modules=["body"], modules_to_save=["head"])
        surgery.save(surgery.inject(model, config), tmp_path / name)
    assert run("combine", tmp_path / "a", tmp_path / "b", tmp_path / "out").code == 0
    assert json.loads((tmp_path / "out/adapter_config.json").read_text())["modules_to_save"] == ["head"]
    assert "the saved head.bias is not as in" in told(run("combine", tmp_path / "a", tmp_path / "c", tmp_path / "x"), 3)


def test_an_output_that_is_there_or_read_is_code_6(run: Run, adapter: Path) -> None:
    told(run("combine", adapter, adapter, "--overwrite"), 6)
