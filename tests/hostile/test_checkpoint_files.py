"""Bases and adapters whose files are damaged or contradict each other: exit code 3, one line, and nothing written."""

import signal
from collections.abc import Iterator
from pathlib import Path

import damages
import pytest
import torch
from damages import BASE_CONFIG, CONFIG, INDEX, LACKING, SHARD, SHARDS, TENSORS, Damage, Damages, in_json, write
from safetensors.torch import save_file
from torch import nn

import surgery
from surgery.cli import main

SHARD_NAMES = {
    "of a file that is not there": "none.safetensors",
    "of another kind": "a.bin",
    "of a folder above": "..",
    "of the folder": ".",
    "empty": "",
    "with NUL": "a\0.safetensors",
    "with a newline": "a\n.safetensors",
    "with half a surrogate pair": "\ud800.safetensors",
    "of 300 characters": "a" * 300 + ".safetensors",
    "in a folder": "a/b.safetensors",
    "with a backslash": "a\\b.safetensors",
    "null": None,
    "a number": 5,
    "a list": [SHARDS[1]],
    "a table": {},
}
CONFIG_VALUES: dict[str, tuple[object, ...]] = {
    "peft_type": (LACKING, None, 5, ["LORA"], "lora", ""),
    "r": ("2", None, True, 0, -1, 2.0, [], 10**400),
    "lora_alpha": ("8", None, False, [], float("nan"), float("inf"), 10**400),
    "lora_dropout": ("0", -0.5, 10**400),
    "target_modules": (5, {}, [5], [""], [["0"]]),
    "modules_to_save": ("head", 5, [None]),
    "rank_pattern": (["0"], "0", {"0": "2"}, {"0": 0}, {"(": 2}),
    "alpha_pattern": ([4], {"0": None}, {"0": 10**400}, {"(": 2}),
    "use_rslora": ("false", 1, []),
    "fan_in_fan_out": ("false", 1, []),
    "init_lora_weights": ("pissa", 5, []),
    "bias": ("all", 5),
}


def all_of(*tables: Damages) -> pytest.MarkDecorator:
    return pytest.mark.parametrize(
        "damage", [pytest.param(damage, id=what) for table in tables for what, damage in table.items()]
    )


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """base, of two shards with their index, and adapter."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 3))
    tensors = model.state_dict()
    (tmp_path / "base").mkdir()
    weight_map = {name: SHARDS[int(name[0])] for name in tensors}
    for shard in SHARDS:
        here = {name: values for name, values in tensors.items() if weight_map[name] == shard}
        save_file(here, tmp_path / "base" / shard, {"format": "pt"})
    write(tmp_path / INDEX, {"metadata": {"total_size": 204}, "weight_map": weight_map})
    write(tmp_path / BASE_CONFIG, {"dtype": "float32"})
    config = surgery.LoraConfig(r=2, target_modules=["0", "1"], init_lora_weights=False)
    surgery.save(surgery.inject(model, config), tmp_path / "adapter")
    return tmp_path


@pytest.fixture(autouse=True)
def no_hang() -> Iterator[None]:
    """A read that blocks ends the test after 10 seconds."""

    def stop(*_: object) -> None:
        raise SystemExit("10 seconds, and no answer")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(10)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def merged(folder: Path, *options: str) -> int | str | None:
    with pytest.raises(SystemExit) as stopped:
        main(["merge", str(folder / "base"), str(folder / "adapter"), str(folder / "out"), *options])
    return stopped.value.code


def listing(folder: Path) -> dict[Path, int]:
    """All that lies in a folder, and when it was changed."""
    return {path: path.lstat().st_mtime_ns for path in (folder, *folder.rglob("*"))}


def refuses(folder: Path, capsys: pytest.CaptureFixture[str], *options: str) -> str:
    """The one line that a merge of adapter into base says, which ends with 3 and has touched nothing."""
    before = listing(folder)
    code = merged(folder, *options)
    out, err = capsys.readouterr()
    assert code == 3, err
    assert not out
    assert err.startswith("surgery: ")
    assert err.endswith("\n")
    assert err[:-1].isprintable()
    assert "Traceback" not in err
    assert {path.name for path in folder.iterdir()} <= {"adapter", "base", "outside.safetensors"}
    assert listing(folder) == before  # not even a staging folder that came and went
    return err


@pytest.mark.parametrize("options", [(), ("--dtype", "bfloat16"), ("--reversible",)])
def test_the_sound_files_merge(folder: Path, options: tuple[str, ...]) -> None:
    assert not merged(folder, *options)
    assert sorted(path.name for path in folder.iterdir()) == ["adapter", "base", "out"]


@pytest.mark.parametrize("name", SHARD_NAMES.values(), ids=SHARD_NAMES.keys())
def test_a_shard_name_that_names_no_shard_is_refused(
    folder: Path, name: object, capsys: pytest.CaptureFixture[str]
) -> None:
    in_json(INDEX, "weight_map", "1.bias", value=name)(folder)
    refuses(folder, capsys)


@all_of(
    {f"weight_map {value}": in_json(INDEX, "weight_map", value=value) for value in (None, 5, [], {}, "a")},
    {
        "no weight_map": in_json(INDEX, "weight_map", value=LACKING),
        "a tensor said to be in another shard": in_json(INDEX, "weight_map", "1.bias", value=SHARDS[0]),
        "a tensor that no shard has": in_json(INDEX, "weight_map", "2\n.bias", value=SHARDS[0]),
        "a tensor left out of the index": in_json(INDEX, "weight_map", "1.bias", value=LACKING),
        "a shard's tensor that the index lacks": damages.one_tensor_not_in_the_index,
        "a tensor in two shards, told of the first": damages.one_tensor_twice,
        "a tensor in two shards, told of the second": damages.one_tensor_twice_told_of_the_second,
    },
)
def test_an_index_and_shards_that_do_not_agree_are_refused(
    folder: Path, damage: Damage, capsys: pytest.CaptureFixture[str]
) -> None:
    damage(folder)
    assert str(folder / "base") in refuses(folder, capsys)


@all_of({one.__name__: one for one in (damages.one_shard_outside, damages.one_shard_at_an_absolute_path)})
def test_an_index_that_leads_out_of_its_folder_is_refused(
    folder: Path, damage: Damage, capsys: pytest.CaptureFixture[str]
) -> None:
    damage(folder)
    assert "is no shard's name" in refuses(folder, capsys)


@pytest.mark.parametrize("metadata", [5, "abc", [1], [[1, 2]], True])
@pytest.mark.parametrize("options", [(), ("--dtype", "bfloat16")])
def test_an_index_whose_metadata_is_no_table_is_refused(
    folder: Path, metadata: object, options: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    in_json(INDEX, "metadata", value=metadata)(folder)
    refuses(folder, capsys, *options)


@pytest.mark.parametrize("options", [(), ("--dtype", "bfloat16")])
@all_of(damages.no_json(INDEX), damages.no_json(BASE_CONFIG), damages.no_json(CONFIG))
def test_json_that_is_none_is_refused(
    folder: Path, damage: Damage, options: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    damage(folder)
    refuses(folder, capsys, *options)


@pytest.mark.parametrize("options", [(), ("--reversible",)])
@all_of(damages.no_tensors(SHARD), damages.no_tensors(TENSORS))
def test_tensors_that_are_none_are_refused(
    folder: Path, damage: Damage, options: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    before = listing(folder)
    damage(folder)
    assert listing(folder) != before
    refuses(folder, capsys, *options)


@all_of(*(damages.no_file(file) for file in (INDEX, BASE_CONFIG, SHARD, CONFIG, TENSORS)))
def test_what_is_no_file_is_refused(folder: Path, damage: Damage, capsys: pytest.CaptureFixture[str]) -> None:
    damage(folder)
    refuses(folder, capsys)


@all_of(
    *(damages.lacking(file) for file in (INDEX, SHARD, CONFIG, TENSORS)),
    {"no base": damages.no_base, "an empty base": damages.an_empty_base, "no adapter": damages.no_adapter},
)
def test_what_is_lacking_is_named(folder: Path, damage: Damage, capsys: pytest.CaptureFixture[str]) -> None:
    damage(folder)
    assert str(folder) in refuses(folder, capsys)


@all_of({one.__name__: one for one in (damages.a_base_in_a_pickle, damages.a_base_that_is_a_pickle)})
def test_a_base_that_is_a_pickle_is_refused_unread(
    folder: Path, damage: Damage, capsys: pytest.CaptureFixture[str]
) -> None:
    damage(folder)
    assert "safetensors" in refuses(folder, capsys)


def test_an_adapter_that_is_a_pickle_is_refused_unread(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    damages.an_adapter_in_a_pickle(folder)
    assert "can run code" in refuses(folder, capsys)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        pytest.param(field, value, id=f"{field}-{i}")
        for field, values in CONFIG_VALUES.items()
        for i, value in enumerate(values)
    ],
)
def test_a_value_that_a_config_cannot_have_is_refused_with_the_file_named(
    folder: Path, field: str, value: object, capsys: pytest.CaptureFixture[str]
) -> None:
    in_json(CONFIG, field, value=value)(folder)
    assert str(folder / "adapter") in refuses(folder, capsys)
