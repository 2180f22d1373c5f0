"""A sound base and adapter as files, merged by the command line, and what is asked of a merge that is refused."""

from pathlib import Path

import pytest
import torch
from damages import BASE_CONFIG, INDEX, SHARDS, write
from safetensors.torch import save_file
from torch import nn

import surgery
from surgery.cli import main


def sound(folder: Path) -> Path:
    """base, of two shards with their index, and adapter, in `folder`."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 3))
    tensors = model.state_dict()
    (folder / "base").mkdir()
    weight_map = {name: SHARDS[int(name[0])] for name in tensors}
    for shard in SHARDS:
        here = {name: values for name, values in tensors.items() if weight_map[name] == shard}
        save_file(here, folder / "base" / shard, {"format": "pt"})
    write(folder / INDEX, {"metadata": {"total_size": 204}, "weight_map": weight_map})
    write(folder / BASE_CONFIG, {"dtype": "float32"})
    config = surgery.LoraConfig(r=2, target_modules=["0", "1"], init_lora_weights=False)
    surgery.save(surgery.inject(model, config), folder / "adapter")
    return folder


def merged(folder: Path, *options: str) -> int | str | None:
    """The exit code of a merge of adapter into base."""
    with pytest.raises(SystemExit) as stopped:
        main(["merge", str(folder / "base"), str(folder / "adapter"), str(folder / "out"), *options])
    return stopped.value.code


def listing(folder: Path) -> dict[Path, int]:
    """All that lies in a folder, and when it was changed."""
    return {path: path.lstat().st_mtime_ns for path in folder.rglob("*")}


def refuses(folder: Path, capsys: pytest.CaptureFixture[str], *options: str) -> str:
    """The one line that a merge of adapter into base says, which ends with 3 and has touched nothing."""
    before = listing(folder)
    capsys.readouterr()
    code = merged(folder, *options)
    out, err = capsys.readouterr()
    assert code == 3, err
    assert not out
    assert err.startswith("surgery: ")
    assert err.endswith("\n")
    assert err[:-1].isprintable()
    assert "Traceback" not in err
    assert not (folder / "out").exists()
    assert listing(folder) == before
    return err
