"""A tensor of any dtype that safetensors knows is carried as bytes; an adapter that targets it is refused by name."""

import json
import struct
from pathlib import Path

import pytest
import torch
from checkpoint_folders import base_tensors, factors, file_hashes, write_adapter, write_base

import surgery
from surgery.codecs.plain import PLAIN_DTYPES
from surgery.core.site import TensorInfo
from surgery.errors import FormatError
from surgery.io.header import DTYPES, encode_header
from surgery.io.tensor_file import TensorFile

OTHERS = [spelling for spelling, dtype in DTYPES.items() if dtype not in PLAIN_DTYPES]


def add(path: Path, infos: list[TensorInfo]) -> None:
    """Tensors of counted bytes, behind those of the file."""
    raw = path.read_bytes()
    header = TensorFile(path).header
    held = [entry.info for entry in header.entries]
    data = b"".join(bytes(i % 2 for i in range(info.nbytes)) for info in infos)
    path.write_bytes(encode_header([*held, *infos], header.metadata) + raw[len(header.raw) :] + data)


@pytest.fixture
def base(tmp_path: Path) -> Path:
    folder = write_base(tmp_path / "base", base_tensors(torch.bfloat16))
    infos = [TensorInfo(f"odd.{spelling}.weight", DTYPES[spelling], (4, 6)) for spelling in DTYPES]
    add(folder / "model.safetensors", infos)
    return folder


@pytest.mark.parametrize("dtype", [None, "float32"])
def test_tensors_of_every_dtype_are_carried_by_merge_and_unmerge(base: Path, tmp_path: Path, dtype: str | None) -> None:
    adapter = write_adapter(tmp_path / "adapter")
    report = surgery.merge_checkpoint(base, adapter, tmp_path / "out", reversible=True, dtype=dtype)
    assert {f"odd.{spelling}.weight" for spelling in OTHERS} <= report.receipt["untouched"].keys()
    assert surgery.verify_checkpoint(tmp_path / "out").ok
    if dtype is None:
        grades = surgery.verify_checkpoint(base, adapter, tmp_path / "out").tensors
        assert {grades[f"odd.{spelling}.weight"].grade for spelling in OTHERS} == {"untouched"}
    surgery.unmerge_checkpoint(tmp_path / "out", tmp_path / "back")
    assert file_hashes(tmp_path / "back") == file_hashes(base)


def test_inspect_lists_every_dtype_with_its_bytes(base: Path) -> None:
    rows = {row.name: row for row in surgery.inspect(base).rows}
    assert rows["odd.F4"].dtype == "F4"
    assert [rows[f"odd.{spelling}"].size_bytes for spelling in ("F4", "F6_E2M3", "F8_E8M0", "F64")] == [12, 18, 24, 192]


@pytest.mark.parametrize("spelling", OTHERS)
def test_an_adapter_that_targets_a_dtype_that_is_no_float_is_refused_by_name(
    base: Path, tmp_path: Path, spelling: str
) -> None:
    site = f"odd.{spelling}"
    pair = {f"{site}.lora_A.weight": torch.ones(4, 6), f"{site}.lora_B.weight": torch.ones(4, 4)}
    adapter = write_adapter(tmp_path / "adapter", factors() | pair)
    plan = surgery.plan(base, adapter)
    assert [str(error).split(":")[0] for error in plan.refusals] == [f"{site}.weight"]
    with pytest.raises(FormatError, match=rf"^{site}\.weight: held as .*; plain floats are wanted; dequantize"):
        surgery.merge_checkpoint(base, adapter, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("spelling", ["F4", "F8_E8M0"])
def test_an_adapter_that_holds_or_replaces_a_format_torch_lacks_is_refused_by_name(
    base: Path, tmp_path: Path, spelling: str
) -> None:
    replacing = write_adapter(
        tmp_path / "replacing", factors() | {f"odd.{spelling}.weight": torch.ones(4, 6)}, modules_to_save=[spelling]
    )
    with pytest.raises(FormatError, match=rf"odd\.{spelling}\.weight: held as {spelling}"):
        surgery.merge_checkpoint(base, replacing, tmp_path / "out")
    holding = write_adapter(tmp_path / "holding")
    add(holding / "adapter_model.safetensors", [TensorInfo("x.lora_A.weight", DTYPES[spelling], (4, 6))])
    with pytest.raises(FormatError, match=rf"holding.*: x\.lora_A\.weight: held as {spelling}"):
        surgery.merge_checkpoint(base, holding, tmp_path / "out")


def test_a_file_with_such_a_tensor_is_the_librarys_to_the_byte() -> None:
    header = encode_header([TensorInfo("a", DTYPES["F4"], (2, 3))], {})
    assert json.loads(header[8:]) == {"a": {"dtype": "F4", "shape": [2, 3], "data_offsets": [0, 3]}}
    assert struct.unpack("<Q", header[:8])[0] == len(header) - 8
