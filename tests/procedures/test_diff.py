"""diff tells what differs between two checkpoints, exactly, however each is cut and by any number of workers."""

import itertools
import json
import math
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_folders import base_tensors, flip_byte, rewrite, write_base
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor

import surgery
from surgery import CheckError, DiffReport, EnvironmentFault
from surgery.core.arithmetic import tree_sum
from surgery.core.source import TILE_ELEMENTS
from surgery.hosts.checkpoint import Checkpoint
from surgery.io.tensor_file import TensorFile
from surgery.procedures.checking.config_difference import config_difference
from surgery.procedures.checking.diff import diff

FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
OTHERS = (torch.int64, torch.int32, torch.int16, torch.uint8, torch.bool, torch.float8_e4m3fn, torch.complex64)
EPS = torch.finfo(torch.float64).eps


def _diff(tmp_path: Path, a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> DiffReport:
    for name, tensors in (("a", a), ("b", b)):
        save_file(dict(tensors), tmp_path / f"{name}.safetensors")
    return surgery.diff(tmp_path / "a.safetensors", tmp_path / "b.safetensors")


def _one(tmp_path: Path, a: Tensor, b: Tensor) -> dict[str, Any]:
    """What the JSON tells of one tensor; it must be JSON without NaN."""
    told = _diff(tmp_path, {"t": a}, {"t": b}).to_json()
    found: dict[str, Any] = json.loads(json.dumps(told), parse_constant=pytest.fail)["tensors"]["t"]
    return found


@pytest.mark.parametrize("dtype", [*FLOATS, torch.int32], ids=str)
def test_a_checkpoint_does_not_differ_from_itself_in_other_shards(dtype: torch.dtype, tmp_path: Path) -> None:
    config = {"model_type": "llama", "text_config": {"vocab_size": 11}}
    a = write_base(tmp_path / "a", base_tensors(dtype), config=config)
    b = write_base(tmp_path / "b", base_tensors(dtype), shards=3, config=config)
    report = surgery.diff(a, b)
    assert report.equal
    assert report.counts == dict.fromkeys(report.counts, 0) | {"equal": 9}
    assert report.summary() == "9 equal"
    report.require()


def test_names_of_one_side_and_other_shapes_are_told_in_the_order_of_the_files(tmp_path: Path) -> None:
    a = {"x.a": torch.ones(2), "x.b": torch.ones(2, 3), "x.c": torch.ones(2), "x.d": torch.tensor(1.0)}
    b = {"x.a": torch.ones(2), "x.b": torch.ones(3, 2), "x.d": torch.ones(1), "x.z": torch.ones(2)}
    report = _diff(tmp_path, a, b)
    whats = {name: one.what for name, one in report.tensors.items()}
    assert whats == {"x.a": "equal", "x.b": "shape", "x.c": "only in a", "x.d": "shape", "x.z": "only in b"}
    assert list(whats)[-1] == "x.z"
    told = report.to_json()["tensors"]
    assert told["x.b"]["shape"] == {"a": [2, 3], "b": [3, 2]}
    assert told["x.c"]["dtype"] == {"a": "float32", "b": None}
    assert report.summary() == "1 equal, 2 of another shape, 1 only in A, 1 only in B"
    with pytest.raises(CheckError, match="2 of another shape"):
        report.require()


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_the_figures_of_floats_are_exact(dtype: torch.dtype, tmp_path: Path) -> None:
    a = torch.tensor([1.0, -2.0, 0.0, 4.0, 0.5, -0.5]).to(dtype)
    b = a.clone()
    b[0] += torch.finfo(dtype).eps * 3
    b[3] = 3.0
    found = _one(tmp_path, a.view(2, 3), b.view(2, 3))
    steps = abs(_place(a[3]) - _place(b[3]))
    assert steps == 0.5 / torch.finfo(dtype).eps
    norm_a, norm_apart = math.sqrt(21.5), math.sqrt(1 + (3 * torch.finfo(dtype).eps) ** 2)
    assert found == {
        "what": "values",
        "dtype": {"a": str(dtype)[6:], "b": str(dtype)[6:]},
        "shape": {"a": [2, 3], "b": [2, 3]},
        "elements": 6,
        "differing": 2,
        "not_finite": 0,
        "max_abs_error": 1.0,
        "max_ulps": steps,
        "norm_a": norm_a,
        "norm_difference": norm_apart,
        "relative": norm_apart / norm_a,
    }


def _place(value: Tensor) -> int:
    """The place of a float among all of its dtype: by its bytes, as sign and magnitude; -0 lies just before 0."""
    data = bytes(value.reshape(1).view(torch.uint8).tolist())
    whole = int.from_bytes(data, "little")
    half = 1 << (8 * len(data) - 1)
    return whole if whole < half else half - 1 - whole


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_ulps_are_places_between_two_floats_whatever_their_signs(dtype: torch.dtype, tmp_path: Path) -> None:
    info = torch.finfo(dtype)
    values = [0.0, -0.0, 1.0, -1.0, info.tiny, -info.tiny, info.smallest_normal / 2, info.max, -info.max]
    for x, y in itertools.combinations(torch.tensor(values, dtype=torch.float64).to(dtype), 2):
        found = _one(tmp_path, x.reshape(1), y.reshape(1))
        if _place(x) == _place(y):
            assert found["what"] == "equal"
            continue
        assert (found["differing"], found["max_ulps"]) == (1, abs(_place(x) - _place(y)))
        error = abs(float(x) - float(y))
        assert found["max_abs_error"] == (error if math.isfinite(error) else None)


@pytest.mark.parametrize("narrow", [torch.bfloat16, torch.float16], ids=str)
def test_a_rounded_copy_is_within_half_an_ulp_of_its_own_dtype(narrow: torch.dtype, tmp_path: Path) -> None:
    torch.manual_seed(0)
    wide = torch.cat([torch.randn(500), torch.tensor([1.0 + torch.finfo(narrow).eps / 2, 0.0, -0.0, 2.0])])
    for a, b in ((wide, wide.to(narrow)), (wide.to(narrow), wide)):
        found = _one(tmp_path, a, b)
        assert found["what"] == "values"
        assert found["max_ulps"] == 0.5  # the tie reaches it
        assert found["differing"] == int((wide.to(narrow).float() != wide).sum())


def test_equal_values_of_another_dtype_are_told_as_dtype(tmp_path: Path) -> None:
    values = torch.tensor([1.0, -0.0, torch.inf, torch.nan, 0.5])
    found = _one(tmp_path, values, values.bfloat16())
    assert (found["what"], found["differing"], found["max_ulps"]) == ("dtype", 0, 0)
    assert found["dtype"] == {"a": "float32", "b": "bfloat16"}
    other = _one(tmp_path, values, torch.tensor([1.0, 0.0, torch.inf, torch.nan, 0.5]).bfloat16())
    assert (other["what"], other["differing"], other["max_abs_error"]) == ("values", 1, 0.0)


def test_a_nan_against_a_number_of_another_dtype_differs(tmp_path: Path) -> None:
    a, b = torch.tensor([torch.nan, 1.0, 2.0, torch.nan]), torch.tensor([1.0, torch.nan, 2.0, torch.nan])
    found = _one(tmp_path, a, b.half())
    assert (found["what"], found["differing"], found["not_finite"]) == ("values", 2, 2)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_what_is_not_finite_is_counted_and_leaves_the_other_errors(dtype: torch.dtype, tmp_path: Path) -> None:
    a = torch.tensor([1.0, torch.nan, torch.inf, 3.0, torch.nan, -torch.inf, 5.0]).to(dtype)
    b = torch.tensor([1.0, torch.nan, torch.inf, 3.5, 2.0, torch.inf, torch.nan]).to(dtype)
    found = _one(tmp_path, a, b)
    assert (found["differing"], found["not_finite"], found["max_abs_error"]) == (4, 3, 0.5)
    assert found["max_ulps"] == abs(_place(a[3]) - _place(b[3]))
    assert [found[key] for key in ("norm_a", "norm_difference", "relative")] == [None, None, None]
    alone = _one(tmp_path, torch.tensor([1.0]).to(dtype), torch.tensor([torch.nan]).to(dtype))
    assert (alone["differing"], alone["not_finite"], alone["max_abs_error"]) == (1, 1, 0.0)


def test_equal_bytes_are_equal_even_of_nan_and_other_nans_differ(tmp_path: Path) -> None:
    bits = torch.tensor([0x7FC00000, 0x7F800000, 0x7FC00001], dtype=torch.int32)
    assert _one(tmp_path, bits.view(torch.float32), bits.view(torch.float32))["what"] == "equal"
    other = bits + torch.tensor([1, 0, 0], dtype=torch.int32)
    found = _one(tmp_path, bits.view(torch.float32), other.view(torch.float32))
    assert (found["what"], found["differing"], found["not_finite"]) == ("values", 1, 1)


@pytest.mark.parametrize("dtype", OTHERS, ids=str)
def test_what_is_no_float_is_compared_by_its_bytes(dtype: torch.dtype, tmp_path: Path) -> None:
    a = torch.tensor([[1, 0, 1], [0, 1, 1]]).to(dtype)
    b = torch.tensor([[1, 1, 1], [0, 1, 0]]).to(dtype)
    assert _one(tmp_path, a, a)["what"] == "equal"
    found = _one(tmp_path, a, b)
    assert (found["what"], found["elements"], found["differing"]) == ("values", 6, 2)
    figures = ("not_finite", "max_abs_error", "max_ulps", "norm_a", "norm_difference", "relative")
    assert [found[key] for key in figures] == [None] * 6


@pytest.mark.parametrize(
    ("a", "b", "what", "differing"),
    [
        (torch.int8, torch.uint8, "dtype", 0),
        (torch.int32, torch.int64, "dtype", None),
        (torch.int32, torch.float32, "values", 2),
        (torch.float8_e5m2, torch.bfloat16, "dtype", None),
    ],
)
def test_dtypes_that_are_not_both_floats_are_compared_where_their_elements_are_of_one_size(
    a: torch.dtype, b: torch.dtype, what: str, differing: int | None, tmp_path: Path
) -> None:
    values = torch.tensor([0, 1, 2])
    found = _one(tmp_path, values.to(a), values.to(b))
    assert (found["what"], found["differing"]) == (what, differing)


@pytest.mark.parametrize("shape", [(0,), (0, 4), (), (1,)])
def test_empty_tensors_and_scalars_are_compared(shape: tuple[int, ...], tmp_path: Path) -> None:
    found = _one(tmp_path, torch.ones(shape), torch.ones(shape) * 3)
    count = torch.ones(shape).numel()
    assert (found["what"], found["differing"]) == (("values", 1) if count else ("equal", 0))
    assert (found["norm_a"], found["norm_difference"]) == (count, 2 * count)
    assert found["relative"] == 2 * count


def test_a_zero_tensor_has_no_relative_error(tmp_path: Path) -> None:
    found = _one(tmp_path, torch.zeros(3), torch.ones(3))
    assert (found["norm_a"], found["norm_difference"], found["relative"]) == (0, math.sqrt(3), None)


def _large(folder: Path, seed: int, shards: int) -> Path:
    torch.manual_seed(seed)
    tensors = {f"w{n}": torch.randn(700, 900).to(dtype) for n, dtype in enumerate(FLOATS)}
    tensors |= {"flat": torch.randn(TILE_ELEMENTS + 1), "n": torch.arange(TILE_ELEMENTS * 2 + 3)}
    return write_base(folder, tensors, shards)


def test_any_number_of_workers_and_threads_gives_the_same_report(tmp_path: Path) -> None:
    paths = _large(tmp_path / "a", 0, 1), _large(tmp_path / "b", 1, 4)
    told, threads = [], torch.get_num_threads()
    with Checkpoint(paths[0]) as a, Checkpoint(paths[1]) as b:
        for workers, of_torch in ((1, 1), (1, 4), (2, 2), (7, 1)):
            torch.set_num_threads(of_torch)
            told.append(diff(a, b, workers))
            torch.set_num_threads(threads)
        names = [info.name for info in a.tensors()]
    assert all(one == told[0] for one in told)
    assert list(told[0].tensors) == names
    whole = (torch.randn(700, 900, generator=torch.Generator().manual_seed(0)).double() ** 2).sum().sqrt()
    found = told[0].tensors["w0"].difference
    assert found is not None
    assert found.norm_a == pytest.approx(float(whole), rel=700 * 900 * EPS)


@pytest.mark.parametrize("at", [0, TILE_ELEMENTS - 1, TILE_ELEMENTS, 2 * TILE_ELEMENTS + 2])
@pytest.mark.parametrize("dtype", [torch.float16, torch.int64], ids=str)
def test_an_element_at_a_border_of_tiles_is_seen_once(at: int, dtype: torch.dtype, tmp_path: Path) -> None:
    a = torch.ones(2 * TILE_ELEMENTS + 3, dtype=dtype)
    b = a.clone()
    b[at] = 2
    found = _one(tmp_path, a, b)
    assert (found["elements"], found["differing"]) == (a.numel(), 1)
    assert found["norm_a"] == (math.sqrt(a.numel()) if dtype.is_floating_point else None)


@pytest.mark.parametrize("at", [(0, -1), (-1, 0)])
def test_the_largest_of_all_tiles_counts(at: tuple[int, int], tmp_path: Path) -> None:
    a = torch.ones(2 * TILE_ELEMENTS + 3)
    b = a.clone()
    b[at[0]], b[at[1]] = 1.5, 1.25
    found = _one(tmp_path, a, b)
    assert (found["differing"], found["max_abs_error"], found["max_ulps"]) == (2, 0.5, 1 << 22)
    assert found["norm_difference"] == math.sqrt(0.5**2 + 0.25**2)


def test_no_piece_that_is_read_is_larger_than_a_tile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = _large(tmp_path / "a", 0, 1), _large(tmp_path / "b", 0, 2)
    whole, sizes = TensorFile.read, []

    def read(file: TensorFile, start: int, size: int) -> bytearray:
        sizes.append(size)
        return whole(file, start, size)

    monkeypatch.setattr(TensorFile, "read", read)
    assert surgery.diff(*paths).equal
    assert max(sizes) == 8 * TILE_ELEMENTS


def test_a_failure_of_reading_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = _large(tmp_path / "a", 0, 1), _large(tmp_path / "b", 0, 2)
    whole = TensorFile.read

    def read(file: TensorFile, start: int, size: int) -> bytearray:
        if start > 1_000_000:
            raise EnvironmentFault(f"{file.where}: reading failed; check the disk")
        return whole(file, start, size)

    monkeypatch.setattr(TensorFile, "read", read)
    with pytest.raises(EnvironmentFault, match="reading failed"):
        surgery.diff(*paths)


def test_one_flipped_bit_is_seen(tmp_path: Path) -> None:
    a, b = (write_base(tmp_path / name, base_tensors(torch.bfloat16)) for name in "ab")
    flip_byte(b / "model.safetensors")
    counts = surgery.diff(a, b).counts
    assert (counts["equal"], counts["values"]) == (8, 1)


def test_a_merge_differs_where_its_receipt_says_so(tmp_path: Path) -> None:
    tensors = base_tensors(torch.float32)
    a = write_base(tmp_path / "a", tensors)
    b = write_base(tmp_path / "b", tensors)
    rewrite(b / "model.safetensors", {"lm_head.weight": tensors["lm_head.weight"] * 2})
    found = surgery.diff(a, b).tensors["lm_head.weight"].difference
    assert found is not None
    assert found.relative == 1.0


def test_keys_of_config_json_are_compared_by_their_dotted_paths(tmp_path: Path) -> None:
    config = {"a": 1, "b": {"c": [1, 2], "d": {"e": None}}, "f": 1, "g": {}, "h": {"i": 1}, "same": [{"x": 1.5}]}
    other = {"a": 1.0, "b": {"c": [1, 2, 3], "d": {"e": None}}, "f": True, "h": 2, "same": [{"x": 1.5}]}
    a = write_base(tmp_path / "a", {"t": torch.ones(1)}, config=config)
    b = write_base(tmp_path / "b", {"t": torch.ones(1)}, config=other)
    report = surgery.diff(a, b)
    assert json.dumps(report.config) == json.dumps(
        {
            "a": {"a": 1, "b": 1.0},
            "b.c": {"a": [1, 2], "b": [1, 2, 3]},
            "f": {"a": 1, "b": True},
            "g": {"a": {}},
            "h": {"b": 2},
            "h.i": {"a": 1},
        }
    )
    assert not report.equal
    assert report.summary() == "1 equal, 6 in config.json"


def test_a_config_on_one_side_alone_differs(tmp_path: Path) -> None:
    a = write_base(tmp_path / "a", {"t": torch.ones(1)}, config={"x": {"y": 1e999}})
    b = write_base(tmp_path / "b", {"t": torch.ones(1)})
    (a / "config.json").write_text('{"x": {"y": 1e999}}')
    told = surgery.diff(a, b).to_json()["config"]
    assert told == {"x.y": {"a": "Infinity"}}


JSON = st.recursive(
    st.sampled_from([None, True, False, 0, 1, 1.0, -1, "", "1", "a"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["a", "b", "a.b", ""]), inner),
    max_leaves=8,
)
CONFIGS = st.dictionaries(st.sampled_from(["a", "b", "a.b", ""]), JSON)


@settings(deadline=None)
@given(CONFIGS, CONFIGS)
def test_two_configs_differ_in_no_key_exactly_if_they_are_equal(a: dict[str, Any], b: dict[str, Any]) -> None:
    assert config_difference(a, a) == {}
    same = json.dumps(a, sort_keys=True) == json.dumps(b, sort_keys=True)
    assert (config_difference(a, b) == {}) == same


@settings(deadline=None)
@given(st.lists(st.floats(-1e100, 1e100), max_size=70))
def test_the_sum_by_halves_is_a_sum(values: list[float]) -> None:
    error = len(values) * EPS * math.fsum(map(abs, values))
    assert abs(tree_sum(torch.tensor(values, dtype=torch.float64)) - math.fsum(values)) <= error


def test_the_sum_by_halves_adds_in_its_fixed_order() -> None:
    values = [1e16, 1.0, -1e16, 1.0, 3.0]
    assert tree_sum(torch.tensor(values, dtype=torch.float64)) == ((1e16 + -1e16) + (1.0 + 1.0)) + 3.0
    assert struct.pack("<d", tree_sum(torch.zeros(0, dtype=torch.float64))) == bytes(8)
