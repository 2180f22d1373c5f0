"""verify grades any tool's output: bits, rounding or different, and says of which tensor."""

import json
import math
import threading
from pathlib import Path

import pytest
import torch
from checkpoint_folders import SITES, base_tensors, factors, flip_byte, read_tensors, rewrite, write_adapter, write_base
from safetensors.torch import load_file
from torch import Tensor

import surgery
from surgery import EnvironmentFault, InputError, VerifyReport
from surgery.adapters.peft import read_adapter
from surgery.core.adapter import Weighted
from surgery.core.source import TILE_ELEMENTS
from surgery.hosts.checkpoint import Checkpoint
from surgery.io.tensor_file import TensorFile
from surgery.procedures.checking.grade import Grade
from surgery.procedures.checking.verify import verify_checkpoint, verify_receipt

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SCALING = 6 / 4
TARGET = "model.layers.1.up_proj.weight"


@pytest.fixture(params=DTYPES, ids=str)
def base(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return write_base(tmp_path / "base", base_tensors(request.param))


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    return write_adapter(tmp_path / "adapter")


@pytest.fixture
def merged(base: Path, adapter: Path, tmp_path: Path) -> Path:
    return surgery.merge_checkpoint(base, adapter, tmp_path / "merged").out


def _graded(report: VerifyReport) -> dict[str, str]:
    return {name: one.grade for name, one in report.tensors.items()}


def _wanted(grade: str, **others: str) -> dict[str, str]:
    targets = {f"{site}.weight" for site in SITES}
    names = base_tensors(torch.float32)
    return {name: grade if name in targets else "untouched" for name in names} | others


def _like_peft(base: Path, out: Path, scaling: float = SCALING, left_out: str = "") -> Path:
    """The merge as a float32 tool makes it: the delta rounded to the weight's dtype, then the sum."""
    tensors, given = read_tensors(base), factors()
    for site in SITES:
        if site != left_out:
            delta = (given[f"{site}.lora_B.weight"] @ given[f"{site}.lora_A.weight"]) * scaling
            tensors[f"{site}.weight"] += delta.to(tensors[f"{site}.weight"].dtype)
    return write_base(out, tensors)


def test_our_own_merge_is_graded_bits(base: Path, adapter: Path, merged: Path) -> None:
    report = surgery.verify_checkpoint(base, adapter, merged)
    assert _graded(report) == _wanted("bits")
    assert report.ok
    assert report.counts == {"bits": 4, "rounding": 0, "untouched": 5, "recorded": 0, "different": 0}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_our_own_merge_into_another_dtype_is_graded_bits(dtype: str, base: Path, adapter: Path, tmp_path: Path) -> None:
    surgery.merge_checkpoint(base, [(adapter, 0.3), (adapter, -1.0)], tmp_path / "cast", dtype=dtype, reversible=True)
    report = surgery.verify_checkpoint(base, [(adapter, 0.3), (adapter, -1.0)], tmp_path / "cast")
    cast = read_tensors(base)["lm_head.weight"].dtype != getattr(torch, dtype)
    grades = {"model.positions": "untouched"} | dict.fromkeys(_wanted("bits"), "bits") if cast else _wanted("bits")
    assert _graded(report) == grades | {"model.positions": "untouched"}


def test_a_correct_merge_in_float32_is_graded_rounding(base: Path, adapter: Path, tmp_path: Path) -> None:
    report = surgery.verify_checkpoint(base, adapter, _like_peft(base, tmp_path / "theirs"))
    assert report.ok
    graded = _graded(report)
    assert {name for name, grade in graded.items() if grade != "untouched"} == {f"{site}.weight" for site in SITES}
    assert "rounding" in graded.values()
    assert all(report.tensors[name].max_abs_error > 0 for name, grade in graded.items() if grade == "rounding")


@pytest.mark.parametrize("at", range(0, 60, 5))
def test_an_element_off_by_one_unit_is_graded_as_the_bound_says(
    at: int, base: Path, adapter: Path, merged: Path
) -> None:
    values = read_tensors(merged)[TARGET]
    found = _nudged(values, at, 1)
    rewrite(merged / "model.safetensors", {TARGET: found})
    ideal, allowed = _ideal_and_bound(read_tensors(base)[TARGET])
    close = abs(float(found.view(-1)[at].double() - ideal.view(-1)[at])) <= float(allowed.view(-1)[at])
    report = surgery.verify_checkpoint(base, adapter, merged)
    assert _graded(report) == _wanted("bits", **{TARGET: "rounding" if close else "different"})
    assert report.ok == close


def test_an_element_off_by_many_units_is_different(base: Path, adapter: Path, merged: Path) -> None:
    values = read_tensors(merged)[TARGET]
    rewrite(merged / "model.safetensors", {TARGET: _nudged(values, int(values.abs().argmax()), 64)})
    assert _graded(surgery.verify_checkpoint(base, adapter, merged)) == _wanted("bits", **{TARGET: "different"})


def _ideal_and_bound(weight: Tensor) -> tuple[Tensor, Tensor]:
    """The merge in float64, and half an ulp of result and of delta plus the bound of a product of r terms."""
    A, B = (factors()[TARGET.replace("weight", f"lora_{letter}.weight")].double() for letter in "AB")
    delta, r = SCALING * (B @ A), A.shape[0]
    ideal = weight.double() + delta
    grid = r * 2.0**-21 * B.abs().amax(1, keepdim=True) * A.abs().amax(0, keepdim=True)
    product = grid + (r + 1) * torch.finfo(torch.float32).eps / 2 * (B.abs() @ A.abs())
    size = torch.maximum(weight.double().abs(), ideal.abs())
    return ideal, (_ulp(size, weight.dtype) + _ulp(delta, weight.dtype)) / 2 + SCALING * product


def _ulp(values: Tensor, dtype: torch.dtype) -> Tensor:
    info = torch.finfo(dtype)
    above = torch.frexp(values.abs().clamp(min=info.tiny)).exponent  # values lie in [2^(above - 1), 2^above)
    return 2.0 ** (above.double() - 1) * info.eps


def _nudged(values: Tensor, at: int, steps: int) -> Tensor:
    """One element moved by some units in its last place, away from zero."""
    integer = {4: torch.int32, 2: torch.int16}[values.element_size()]
    bits = values.clone().view(integer).view(-1)
    bits[at] += steps
    return bits.view(values.dtype).view(values.shape)


def test_a_clearly_changed_element_is_different(base: Path, adapter: Path, merged: Path) -> None:
    values = read_tensors(merged)[TARGET].clone()
    values[7, 3] += 0.125
    rewrite(merged / "model.safetensors", {TARGET: values})
    report = surgery.verify_checkpoint(base, adapter, merged)
    assert _graded(report) == _wanted("bits", **{TARGET: "different"})
    assert report.tensors[TARGET].max_abs_error >= 0.1
    assert "further off" in report.tensors[TARGET].why


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_what_is_not_finite_is_different(value: float, base: Path, adapter: Path, merged: Path) -> None:
    values = read_tensors(merged)[TARGET].clone()
    values[0, 0] = value
    rewrite(merged / "model.safetensors", {TARGET: values})
    assert _graded(surgery.verify_checkpoint(base, adapter, merged)) == _wanted("bits", **{TARGET: "different"})


@pytest.mark.parametrize("name", [TARGET, "model.norm.weight", "model.scale"])
def test_a_missing_tensor_is_different(name: str, base: Path, adapter: Path, merged: Path) -> None:
    rewrite(merged / "model.safetensors", {name: None})
    report = surgery.verify_checkpoint(base, adapter, merged)
    assert _graded(report) == _wanted("bits", **{name: "different"})
    assert "missing" in report.tensors[name].why


def test_an_extra_tensor_is_different(base: Path, adapter: Path, merged: Path) -> None:
    rewrite(merged / "model.safetensors", {"model.extra": torch.ones(2)})
    report = surgery.verify_checkpoint(base, adapter, merged)
    assert _graded(report) == _wanted("bits") | {"model.extra": "different"}


def test_a_changed_bit_of_an_untouched_tensor_is_different(base: Path, adapter: Path, merged: Path) -> None:
    name = "model.embed_tokens.weight"
    rewrite(merged / "model.safetensors", {name: _nudged(read_tensors(merged)[name], 0, 1)})
    assert _graded(surgery.verify_checkpoint(base, adapter, merged)) == _wanted("bits", **{name: "different"})


def test_no_error_is_told_of_what_differs_by_its_bytes_alone(base: Path, adapter: Path, merged: Path) -> None:
    graded = surgery.verify_checkpoint(base, adapter, merged).tensors
    name = next(name for name, one in graded.items() if one.grade == "untouched")
    rewrite(merged / "model.safetensors", {name: read_tensors(merged)[name] + 1})
    report = surgery.verify_checkpoint(base, adapter, merged)
    assert report.tensors[name].to_json()["max_abs_error"] is None
    assert next(case.cells[0] for case in report.cases() if case.name == name) == ""


def test_a_merge_with_another_scaling_is_different(base: Path, adapter: Path, tmp_path: Path) -> None:
    theirs = _like_peft(base, tmp_path / "theirs", scaling=SCALING * 1.1)
    assert _graded(surgery.verify_checkpoint(base, adapter, theirs)) == _wanted("different")


def test_a_merge_that_left_one_layer_out_is_different(base: Path, adapter: Path, tmp_path: Path) -> None:
    theirs = _like_peft(base, tmp_path / "theirs", left_out="model.layers.0.q_proj")
    report = surgery.verify_checkpoint(base, adapter, theirs)
    different = {name for name, grade in _graded(report).items() if grade == "different"}
    assert different == {"model.layers.0.q_proj.weight"}
    assert not report.ok


def test_the_base_itself_is_no_merge_of_it(base: Path, adapter: Path) -> None:
    assert _graded(surgery.verify_checkpoint(base, adapter, base)) == _wanted("different")


def test_a_merged_folder_alone_is_held_against_its_receipt(merged: Path) -> None:
    report = surgery.verify_checkpoint(merged)
    assert report.ok
    assert set(report.tensors) == set(base_tensors(torch.float32))
    flip_byte(merged / "model.safetensors")
    changed = surgery.verify_checkpoint(merged)
    assert not changed.ok
    assert changed.counts["different"] == 2  # a tensor and its file


def test_a_folder_without_a_receipt_is_refused(base: Path) -> None:
    with pytest.raises(InputError, match=r"no surgery\.receipt\.json"):
        surgery.verify_checkpoint(base)


def _large(tmp_path: Path) -> tuple[Path, Path]:
    """A base and an adapter of several tiles to a tensor."""
    torch.manual_seed(0)
    tensors = {f"model.layers.{n}.proj.weight": torch.randn(700, 900).bfloat16() for n in range(3)}
    tensors |= {"model.embed.weight": torch.randn(300, 1900), "model.none": torch.ones(0, 4), "model.n": torch.ones(3)}
    given = {f"model.layers.{n}.proj.lora_A.weight": torch.randn(4, 900) / 30 for n in range(3)}
    given |= {f"model.layers.{n}.proj.lora_B.weight": torch.randn(700, 4) / 30 for n in range(3)}
    adapter = write_adapter(tmp_path / "adapter", given, target_modules=["proj"])
    return write_base(tmp_path / "base", tensors, shards=3), adapter


def _several_faults(base: Path, adapter: Path, out: Path) -> Path:
    """A merge with a tensor graded rounding, two that are different in one tile each, and an extra one."""
    surgery.merge_checkpoint(base, adapter, out)
    tensors, original = read_tensors(out), read_tensors(base)
    given = load_file(adapter / "adapter_model.safetensors")
    A, B = (given[f"base_model.model.model.layers.0.proj.lora_{letter}.weight"] for letter in "AB")
    tensors["model.layers.0.proj.weight"] = original["model.layers.0.proj.weight"] + (1.5 * (B @ A)).bfloat16()
    tensors["model.layers.1.proj.weight"][350, 3] += 1
    tensors["model.embed.weight"][299, 1899] += 1
    return write_base(out.with_name("faulty"), tensors | {"model.extra": torch.ones(2)}, shards=2)


@pytest.mark.parametrize("workers", [1, 2, 7])
def test_any_number_of_workers_gives_the_same_report(workers: int, tmp_path: Path) -> None:
    base, adapter = _large(tmp_path)
    faulty = _several_faults(base, adapter, tmp_path / "merged")
    with Checkpoint(base) as source, Checkpoint(faulty) as found:
        report = verify_checkpoint(source, [Weighted(read_adapter(adapter))], found, workers=workers)
        order = [info.name for info in source.tensors()]
    assert list(report.tensors) == [*order, "model.extra"]
    different = {"model.layers.1.proj.weight", "model.embed.weight", "model.extra"}
    graded = {"model.layers.0.proj.weight": "rounding", "model.layers.2.proj.weight": "bits"}
    graded |= dict.fromkeys(("model.none", "model.n"), "untouched") | dict.fromkeys(different, "different")
    assert _graded(report) == graded
    assert report.to_json() == surgery.verify_checkpoint(base, adapter, faulty).to_json()
    assert all(report.tensors[name].why for name in different)


@pytest.mark.parametrize("workers", [1, 2, 7])
def test_any_number_of_workers_reads_the_same_receipt(workers: int, tmp_path: Path) -> None:
    merged = surgery.merge_checkpoint(*_large(tmp_path), tmp_path / "merged").out
    assert verify_receipt(merged, workers).counts["recorded"] == 6
    flip_byte(merged / "model-00002-of-00003.safetensors")
    report = verify_receipt(merged, workers)
    assert report.counts["different"] == 2
    assert list(report.tensors.items()) == list(verify_receipt(merged, 1).tensors.items())


@pytest.mark.parametrize("workers", [1, 2, 7])
def test_a_failure_is_told_and_no_thread_is_left(workers: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base, adapter = _large(tmp_path)
    merged = surgery.merge_checkpoint(base, adapter, tmp_path / "merged").out
    whole, reads, before = TensorFile.read, [], threading.enumerate()  # other tests may have left some

    def read(file: TensorFile, start: int, size: int) -> bytearray:
        reads.append(file.path)
        if file.path.parent == merged and size > 1000:
            raise EnvironmentFault(f"{file.where}: reading failed; check the disk")
        return whole(file, start, size)

    monkeypatch.setattr(TensorFile, "read", read)
    with Checkpoint(base) as source, Checkpoint(merged) as found:
        given, at_first = [Weighted(read_adapter(adapter))], len(reads)
        with pytest.raises(EnvironmentFault, match="reading failed"):
            verify_checkpoint(source, given, found, workers=workers)
    assert len(reads) - at_first <= 4 * (2 * workers + 1)
    with pytest.raises(EnvironmentFault, match="reading failed"):
        verify_receipt(merged, workers)
    assert {*threading.enumerate()} <= {*before}


def test_no_piece_that_is_read_is_larger_than_a_tile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base, adapter = _large(tmp_path)
    merged = surgery.merge_checkpoint(base, adapter, tmp_path / "merged").out
    whole, sizes = TensorFile.read, []

    def read(file: TensorFile, start: int, size: int) -> bytearray:
        sizes.append(size)
        return whole(file, start, size)

    monkeypatch.setattr(TensorFile, "read", read)
    assert surgery.verify_checkpoint(base, adapter, merged).ok
    assert 1 << 18 < max(sizes) <= 4 * TILE_ELEMENTS


def test_the_reason_is_that_of_the_first_tile_that_is_different() -> None:
    tiles = [Grade("bits"), Grade("rounding", 2.0), Grade("different", 1.0, "first"), Grade("different", 3.0, "later")]
    assert tiles[0].worse(tiles[1]) == tiles[1].worse(tiles[0]) == tiles[1]
    assert tiles[1].worse(tiles[2]).worse(tiles[3]).worse(tiles[0]) == Grade("different", 3.0, "first")
    assert tiles[3].worse(Grade("different", math.nan)).to_json()["max_abs_error"] is None


def test_the_report_is_plain_data(base: Path, adapter: Path, merged: Path) -> None:
    told = surgery.verify_checkpoint(base, adapter, merged).to_json()
    assert json.loads(json.dumps(told)) == told
