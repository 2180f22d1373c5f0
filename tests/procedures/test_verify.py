"""verify grades any tool's output: bits, rounding or different, and says of which tensor."""

import json
from pathlib import Path

import pytest
import torch
from checkpoint_folders import SITES, base_tensors, factors, flip_byte, read_tensors, rewrite, write_adapter, write_base
from torch import Tensor

import surgery
from surgery import InputError, VerifyReport

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


def test_the_report_is_plain_data(base: Path, adapter: Path, merged: Path) -> None:
    told = surgery.verify_checkpoint(base, adapter, merged).to_json()
    assert json.loads(json.dumps(told)) == told
