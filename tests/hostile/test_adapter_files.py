"""Each tensor of an adapter dropped, renamed, reshaped or poisoned: exit code 3, and no output."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import surgery
from surgery.cli import main

KEYS = [f"base_model.model.{name}.lora_{role}.weight" for name in ("0", "1") for role in "AB"]
Tensors = dict[str, Tensor]


def dropped(tensors: Tensors, key: str) -> None:
    del tensors[key]


def renamed(tensors: Tensors, key: str) -> None:
    tensors[key.replace("lora_", "lore_")] = tensors.pop(key)


def moved(tensors: Tensors, key: str) -> None:
    tensors[key.replace("model.model.", "model.model.x")] = tensors.pop(key)


def transposed(tensors: Tensors, key: str) -> None:
    tensors[key] = tensors[key].T.contiguous()


def cut(tensors: Tensors, key: str) -> None:
    tensors[key] = tensors[key][:-1].contiguous()


def nan(tensors: Tensors, key: str) -> None:
    tensors[key][0, 0] = torch.nan


def infinite(tensors: Tensors, key: str) -> None:
    tensors[key][-1, -1] = torch.inf


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 12), nn.Linear(12, 6))
    (tmp_path / "base").mkdir()
    save_file(model.state_dict(), tmp_path / "base" / "model.safetensors")
    config = surgery.LoraConfig(r=3, target_modules=["0", "1"], init_lora_weights=False)
    surgery.save(surgery.inject(model, config), tmp_path / "adapter")
    return tmp_path


def merged(folder: Path) -> int | str | None:
    with pytest.raises(SystemExit) as stopped:
        main(["merge", str(folder / "base"), str(folder / "adapter"), str(folder / "out")])
    return stopped.value.code


def test_the_sound_adapter_merges(folder: Path) -> None:
    assert not merged(folder)
    assert (folder / "out" / "model.safetensors").is_file()


@pytest.mark.parametrize("key", KEYS)
@pytest.mark.parametrize("damage", [dropped, renamed, moved, transposed, cut, nan, infinite])
def test_a_damaged_tensor_is_refused(folder: Path, key: str, damage: Callable[[Tensors, str], None]) -> None:
    file = folder / "adapter" / "adapter_model.safetensors"
    tensors = load_file(file)
    assert sorted(tensors) == KEYS
    damage(tensors, key)
    save_file(tensors, file)
    assert merged(folder) == 3
    assert sorted(path.name for path in folder.iterdir()) == ["adapter", "base"]


@pytest.mark.parametrize("field", [{"use_dora": True}, {"r": 4}, {"never_heard_of": 1}, {"peft_type": "NEW"}])
def test_a_config_that_cannot_be_served_is_refused(folder: Path, field: dict[str, object]) -> None:
    file = folder / "adapter" / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | field))
    assert merged(folder) == 3


def test_a_pickle_is_refused_with_the_next_step(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "adapter" / "adapter_model.safetensors").rename(folder / "adapter" / "adapter_model.bin")
    assert merged(folder) == 3
    assert "load it in PEFT and save it again" in capsys.readouterr().err


@pytest.mark.filterwarnings("ignore:.*dealt over the model's modules")
def test_numbers_are_dealt_of_no_longer_vector_than_the_file_holds(tmp_path: Path) -> None:
    config = surgery.UniLoraConfig(theta_d_length=8, target_modules=["0"])
    surgery.save(surgery.inject(nn.Sequential(nn.Linear(8, 12)), config), tmp_path)
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"theta_d_length": 2_000_000_000}))
    with pytest.raises(surgery.ShapeError, match=r"theta is \[8\], but \[2000000000\] is wanted"):
        surgery.load(nn.Sequential(nn.Linear(8, 12)), tmp_path)
