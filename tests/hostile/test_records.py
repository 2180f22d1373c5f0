"""An undo record or a receipt that says anything: the originals, or a refusal, never other bytes or a traceback."""

import copy
import hashlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from merging import sound
from torch import nn

import surgery
from surgery.errors import CheckError, InputError

RECORD, RECEIPT = "surgery.undo/record.json", "surgery.receipt.json"
POISONS = (None, True, -1, 0, 10**30, 1.5, "", "x", "../x", "/etc/passwd", "a\x00b", "é" * 300, [], {}, [[]], {"x": 1})
GONE = object()


@pytest.fixture(scope="module")
def merged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A merged folder with its undo record; its base lies beside."""
    folder = sound(tmp_path_factory.mktemp("sound"))
    model = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 3))
    config = surgery.LoraConfig(r=2, target_modules=["0", "1"], use_dora=True, init_lora_weights=False)
    surgery.save(surgery.inject(model, config), folder / "dora")
    (folder / "dora" / "surgery.base.json").unlink()  # it was made on another base
    adapters = [folder / "adapter", folder / "dora"]
    surgery.merge_checkpoint(folder / "base", adapters, folder / "merged", reversible=True)
    return folder / "merged"


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Each place in a JSON value; of lists and tables of more than three things, the first three."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, held in list(inner)[:3] if path else inner:
        yield (*path, key)
        yield from places(held, (*path, key))


def poisoned(value: Any, path: tuple[Any, ...], poison: object) -> Any:
    """A copy with something else in a place, or nothing."""
    value = copy.deepcopy(value)
    holder = value
    for key in path[:-1]:
        holder = holder[key]
    if poison is GONE:
        del holder[path[-1]]
    else:
        holder[path[-1]] = poison
    return value


def cases(file: Path) -> Iterator[tuple[str, bytes]]:
    """What the file would hold with any place of it poisoned."""
    told = json.loads(file.read_bytes())
    for path in places(told):
        for poison in (*POISONS, GONE):
            yield f"{path}: {poison!r}", json.dumps(poisoned(told, path, poison)).encode()


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def vouched(here: Path) -> None:
    """The receipt names the record that is there."""
    receipt = json.loads((here / RECEIPT).read_bytes())
    receipt["undo_record"] = hashlib.sha256((here / RECORD).read_bytes()).hexdigest()
    (here / RECEIPT).write_text(json.dumps(receipt))


@pytest.fixture
def here(merged: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(merged, tmp_path / "merged"))


def test_a_record_that_says_anything_is_refused_and_nothing_is_written(here: Path) -> None:
    for case, told in cases(here / RECORD):
        (here / RECORD).write_bytes(told)
        with pytest.raises((InputError, CheckError)):
            surgery.unmerge_checkpoint(here, here.parent / "out")
        assert not (here.parent / "out").exists(), case


@pytest.mark.parametrize(
    "field",
    [*({"streams": {bits: [0, 0]}} for bits in ("x", "0", "-1", "63", "9" * 99)), {"kept": [0, 1]}, {"kept": [0, 0]}],
    ids=str,
)
def test_a_field_of_a_tensor_that_cannot_be_is_refused_though_the_receipt_vouches_for_it(
    here: Path, field: dict[str, Any]
) -> None:
    told = json.loads((here / RECORD).read_bytes())
    name = next(name for name, one in told["tensors"].items() if name.endswith("weight") and "layers" in one)
    told["tensors"][name] |= field
    (here / RECORD).write_text(json.dumps(told))
    vouched(here)
    with pytest.raises(InputError, match="damaged"):
        surgery.unmerge_checkpoint(here, here.parent / "out")
    assert not (here.parent / "out").exists()


def test_a_weight_beyond_all_numbers_is_refused(here: Path) -> None:
    told = json.loads((here / RECORD).read_bytes())
    (here / RECORD).write_text(json.dumps(told | {"weights": ["0x1p9999", "0x1p+0"]}))
    with pytest.raises(InputError, match="damaged"):
        surgery.unmerge_checkpoint(here, here.parent / "out")


@pytest.mark.slow
def test_a_record_and_a_receipt_that_vouches_for_it_give_no_bytes_but_the_originals(merged: Path, here: Path) -> None:
    """Who can write both can leave a file out, but not have another made."""
    originals, out, refused = contents(merged.parent / "base"), here.parent / "out", 0
    for case, told in cases(merged / RECORD):
        (here / RECORD).write_bytes(told)
        vouched(here)
        try:
            surgery.unmerge_checkpoint(here, out)
        except (InputError, CheckError):
            refused += 1
            assert not out.exists(), case
        else:
            assert contents(out).items() <= originals.items(), case
            shutil.rmtree(out)
    assert refused > 100


@pytest.mark.slow
def test_a_receipt_that_says_anything_is_refused_or_the_originals_come_back(merged: Path, here: Path) -> None:
    originals, out, refused = contents(merged.parent / "base"), here.parent / "out", 0
    for case, told in cases(merged / RECEIPT):
        (here / RECEIPT).write_bytes(told)
        try:
            surgery.unmerge_checkpoint(here, out)
        except (InputError, CheckError):
            refused += 1
            assert not out.exists(), case
        else:
            assert contents(out) == originals, case
            shutil.rmtree(out)
    assert refused > 100


def test_a_receipt_that_says_anything_is_refused_or_what_it_says_is_checked(here: Path) -> None:
    refused = 0
    for _, told in cases(here / RECEIPT):
        (here / RECEIPT).write_bytes(told)
        try:
            refused += not surgery.verify_checkpoint(here).ok
        except (InputError, CheckError):
            refused += 1
    assert refused > 100
