"""A number that an option wants is no True or False, though Python counts with them, and no text or fraction."""

import inspect
import math
from collections.abc import Callable
from pathlib import Path
from types import UnionType
from typing import Any, get_args, get_type_hints

import pytest
from safetensors.torch import save_file
from torch import nn

import surgery
from surgery.core.option_checks import check_whole, is_finite, is_number

WRONG = (True, False, "2", 2.0, 1.5, [1], -1)
GIVEN: dict[str, Callable[..., Any]] = {
    "merge_checkpoint": lambda **option: surgery.merge_checkpoint("base", "adapter", "out", **{"into": "nf4"} | option),
    "verify_checkpoint": lambda **option: surgery.verify_checkpoint("base", "adapter", "base", **option),
    "plan": lambda **option: surgery.plan("base", "adapter", **option),
    "load": lambda **option: surgery.load(net(), "adapter", **option),
    "record_inputs": lambda **option: surgery.record_inputs(net(), [], "out", **option),
    "combine": lambda **option: surgery.combine("adapter", "out", **_having(option) | option),
    "extract": lambda **option: surgery.extract("base", "base", "out", **option),
    "export_onnx": lambda **option: surgery.export_onnx("base", None, "out", **option),
    "adalora_step": lambda **option: surgery.adalora_step(net(), **option),
}
SIZES = {"max_shard_size", "max_memory"}  # which texts say, too, and whose fractions do no harm


def net() -> nn.Module:
    return nn.Sequential(nn.Linear(2, 2))


@pytest.fixture(autouse=True)
def _base_and_adapter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("base").mkdir()
    save_file(net().state_dict(), "base/model.safetensors")
    surgery.save(surgery.inject(net(), surgery.LoraConfig(r=1, target_modules=["0"])), "adapter")


def _having(option: dict[str, Any]) -> dict[str, Any]:
    """The other settings of a method with this one."""
    return {"method": "svd"} if "rank" in option else {"method": "dare_linear", "density": 0.5}


def options_of(function: Callable[..., Any]) -> list[str]:
    """Those that take whole numbers."""
    hints = get_type_hints(function)
    kinds = {name: get_args(kind) if isinstance(kind, UnionType) else (kind,) for name, kind in hints.items()}
    return [name for name in inspect.signature(function).parameters if int in kinds.get(name, ())]


FUNCTIONS = {name: getattr(surgery, name) for name in surgery.__all__ if inspect.isfunction(getattr(surgery, name))}
OPTIONS = [(name, option) for name, function in FUNCTIONS.items() for option in options_of(function)]


def test_each_function_with_a_whole_number_is_among_these() -> None:
    assert {name for name, _ in OPTIONS} == {*GIVEN}


@pytest.mark.parametrize(("name", "option"), OPTIONS, ids=lambda part: part)
def test_what_is_no_whole_number_is_a_usage_error(name: str, option: str) -> None:
    for value in WRONG if option not in SIZES else (True, False, -1, [1]):
        with pytest.raises(surgery.UsageError, match=option):
            GIVEN[name](**{option: value})


@pytest.mark.parametrize("weight", [True, False, math.nan, math.inf, 1 << 1024, None], ids=lambda one: repr(one)[:9])
def test_the_weight_of_an_adapter_is_a_finite_number(weight: Any) -> None:
    for adapters in (("adapter", weight), [("adapter", weight)]):
        with pytest.raises(surgery.UsageError):
            surgery.plan("base", adapters)


@pytest.mark.parametrize("option", ["min_retained", "max_noise", "energy", "density"])
def test_a_share_is_no_truth_value(option: str) -> None:
    calls: dict[str, Callable[..., Any]] = {
        "energy": GIVEN["extract"],
        "density": lambda **given: surgery.combine("adapter", "out", method="ties", **given),
    }
    with pytest.raises(surgery.UsageError, match=option):
        calls.get(option, GIVEN["merge_checkpoint"])(**{option: True})


def test_whole_numbers_within_the_range_are_given_back() -> None:
    assert [check_whole("n", n, 0, 3) for n in range(4)] == [0, 1, 2, 3]
    assert check_whole("n", 1 << 70, 1) == 1 << 70
    assert is_number(1)
    assert is_finite(1 << 70)
    assert not is_finite(1 << 1024)


def test_numbers_that_python_cannot_write_are_refused_as_others() -> None:
    with pytest.raises(surgery.UsageError, match=r"option is a number too large to print; .* of 1 or more is wanted"):
        check_whole("option", -(10**5000), 1)
    with pytest.raises(surgery.UsageError, match="min_retained"):
        surgery.merge_checkpoint("base", "adapter", "out", into="nf4", min_retained=10**400)
    with pytest.raises(surgery.UsageError, match="is no name of a format"):
        surgery.inject(net(), surgery.LoraConfig(target_modules=["0"]), quantization_aware=["nf4"])  # type: ignore[arg-type]
