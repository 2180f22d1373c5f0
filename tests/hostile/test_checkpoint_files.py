"""What is said of a damaged base or adapter, and that options change nothing about it; the zoo holds them all."""

from pathlib import Path

import damages
import pytest
from damages import BASE_CONFIG, CONFIG, INDEX, SHARD, TENSORS, Damage, Damages, in_json
from merging import merged, refuses


def all_of(*tables: Damages) -> pytest.MarkDecorator:
    return pytest.mark.parametrize(
        "damage", [pytest.param(damage, id=what) for table in tables for what, damage in table.items()]
    )


@pytest.mark.parametrize("options", [(), ("--dtype", "bfloat16"), ("--reversible",)])
def test_the_sound_files_merge(folder: Path, options: tuple[str, ...]) -> None:
    assert not merged(folder, *options)
    assert sorted(path.name for path in folder.iterdir()) == ["adapter", "base", "out"]


@all_of({one.__name__: one for one in (damages.one_shard_outside, damages.one_shard_at_an_absolute_path)})
def test_an_index_that_leads_out_of_its_folder_is_refused(
    folder: Path, damage: Damage, capsys: pytest.CaptureFixture[str]
) -> None:
    damage(folder)
    assert "is no shard's name" in refuses(folder, capsys)


@pytest.mark.parametrize("metadata", [5, [[1, 2]]])
def test_an_index_whose_metadata_is_no_table_is_refused(
    folder: Path, metadata: object, capsys: pytest.CaptureFixture[str]
) -> None:
    in_json(INDEX, "metadata", value=metadata)(folder)
    refuses(folder, capsys, "--dtype", "bfloat16")


@all_of(*(damages.no_json(file) for file in (INDEX, BASE_CONFIG, CONFIG)))
def test_json_that_is_none_is_refused_with_another_dtype_too(
    folder: Path, damage: Damage, capsys: pytest.CaptureFixture[str]
) -> None:
    damage(folder)
    refuses(folder, capsys, "--dtype", "bfloat16")


@all_of(damages.no_tensors(SHARD), damages.no_tensors(TENSORS))
def test_tensors_that_are_none_are_refused_in_a_reversible_merge_too(
    folder: Path, damage: Damage, capsys: pytest.CaptureFixture[str]
) -> None:
    damage(folder)
    refuses(folder, capsys, "--reversible")


@all_of({one.__name__: one for one in (damages.a_base_in_a_pickle, damages.a_base_that_is_a_pickle)})
def test_a_base_that_is_a_pickle_is_refused_unread(
    folder: Path, damage: Damage, capsys: pytest.CaptureFixture[str]
) -> None:
    damage(folder)
    assert "safetensors" in refuses(folder, capsys)
    assert not (folder / "exploded").exists()


def test_an_adapter_that_is_a_pickle_is_refused_unread(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    damages.an_adapter_in_a_pickle(folder)
    assert "can run code" in refuses(folder, capsys)
    assert not (folder / "exploded").exists()
