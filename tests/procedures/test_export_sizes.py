"""export_onnx over sizes: which ones a graph is tried at, and which it refuses."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import surgery


class Shrinking(nn.Module):
    """Does another thing with large batches."""

    def forward(self, x: Tensor) -> Tensor:
        return x if x.shape[0] < 10 else 2 * x


def test_a_module_that_does_another_thing_beyond_some_size_is_refused(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(4, 4), Shrinking())
    with pytest.raises(surgery.InputError, match="hold up to a size of 9 along an axis"):
        surgery.export_onnx(model, None, tmp_path / "out", inputs=torch.ones(3, 4))
    assert list(tmp_path.iterdir()) == []


class Positions(nn.Module):
    """Has places for 6 numbers, and refuses more by itself, as CLIP's text model does."""

    def __init__(self, says_so: bool) -> None:
        super().__init__()
        self.says_so, self.places = says_so, nn.Parameter(torch.randn(6, 4))

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[1] > 6:
            if self.says_so:
                raise ValueError("too many")
            return x
        return x + self.places[: x.shape[1]]


def test_a_module_that_refuses_larger_sizes_itself_is_exported_up_to_these(tmp_path: Path) -> None:
    x = torch.randn(2, 3, 4)
    surgery.export_onnx(Positions(True), None, tmp_path / "out", inputs=x, dynamic_axes={"x": {1: "seq"}})
    with pytest.raises(surgery.InputError, match="hold up to a size of 6 along an axis"):
        surgery.export_onnx(Positions(False), None, tmp_path / "other", inputs=x, dynamic_axes={"x": {1: "seq"}})


class Beside(nn.Module):
    """Its second input is one longer than the first; beyond 6 it does another thing."""

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return x + y[:, 1:] if x.shape[1] <= 6 else x - y[:, 1:]


def test_a_size_that_hangs_on_another_one_is_tried_with_it(tmp_path: Path) -> None:
    given, axes = {"x": torch.randn(2, 3, 4), "y": torch.randn(2, 4, 4)}, {"x": {1: "seq"}, "y": {1: "longer"}}
    with pytest.raises(surgery.InputError, match=r"hold up to a size of [67] along an axis"):
        surgery.export_onnx(Beside(), None, tmp_path / "out", inputs=given, dynamic_axes=axes)


class OfOneSize(nn.Module):
    """Runs for one size of its second axis alone."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(6, 6))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.weight[: x.shape[0]]


@pytest.mark.parametrize(
    ("options", "kind", "told"),
    [
        ({}, surgery.UsageError, "inputs are wanted, as forward takes them"),
        ({"inputs": {"y": torch.ones(2, 6)}}, surgery.UsageError, "forward has no parameter 'y'"),
        ({"inputs": torch.ones(2, 6), "weights": "move"}, surgery.UsageError, "link or copy is wanted"),
        ({"inputs": torch.ones(2, 6), "names": "olive"}, surgery.UsageError, "hf or genai is wanted"),
        ({"kv": True}, surgery.UsageError, "a decoder of transformers alone has a cache"),
        ({"inputs": (1,)}, surgery.UsageError, "a tensor is wanted"),
        ({"inputs": torch.ones(2, 6), "dynamic_axes": {"z": {0: "batch"}}}, surgery.UsageError, "no input 'z'"),
        ({"inputs": torch.ones(2, 6), "dynamic_axes": {"x": {7: "batch"}}}, surgery.UsageError, "on axis 7"),
        (
            {"inputs": torch.ones(2, 6), "dynamic_axes": {"x": {1: "seq"}}},
            surgery.InputError,
            "size alone, 6 along seq",
        ),
    ],
)
def test_inputs_that_cannot_be_are_refused(
    options: dict[str, Any], kind: type[Exception], told: str, tmp_path: Path
) -> None:
    with pytest.raises(kind, match=told):
        surgery.export_onnx(OfOneSize(), None, tmp_path / "out", **options)
    assert list(tmp_path.iterdir()) == []
