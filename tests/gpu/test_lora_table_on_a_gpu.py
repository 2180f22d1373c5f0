"""LoRA in each form over each kind of layer, on a GPU: the laws of the table, the bytes of a CPU, and peft beside."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from device import DEVICE, held, there
from lora_forms import FORMS, LAYERS
from lora_table import Cell, by_peft, laws_of
from torch import nn

import surgery

HELD = [(layer, form) for layer in LAYERS for form in FORMS if layer not in FORMS[form].refused]
each_pair = pytest.mark.parametrize(("layer", "form"), HELD, ids=str)
each_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)


class OnDevice(Cell):
    """A cell whose model lies there."""

    def __init__(self, layer: str, form: str, dtype: torch.dtype, folder: Path) -> None:
        super().__init__(layer, form, dtype, folder)
        folder.mkdir()
        self.x = there(self.x)

    def base(self) -> nn.Module:
        return there(super().base())

    def ours(self, fresh: bool = False) -> nn.Module:
        """Frozen where it is fresh: for weights that are trained, torch.matmul takes another kernel."""
        model = super().ours(fresh)
        return model.requires_grad_(False) if fresh else model


@pytest.fixture(autouse=True)
def _as_before(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Convolutions are not run in tf32, of which the noise that is measured need not know."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    yield
    torch.backends.mha.set_fastpath_enabled(True)


@each_dtype
@each_pair
def test_the_laws_hold(layer: str, form: str, dtype: torch.dtype, tmp_path: Path) -> None:
    for name, law in laws_of(form).items():
        torch.backends.mha.set_fastpath_enabled(name != "fresh changes nothing")  # its kernels are others
        law(OnDevice(layer, form, dtype, tmp_path / name.replace(" ", "-")))


@each_dtype
@each_pair
def test_a_merge_has_the_bytes_of_a_merge_on_a_cpu(layer: str, form: str, dtype: torch.dtype, tmp_path: Path) -> None:
    if FORMS[form].unmerged:
        return
    near, far = Cell(layer, form, dtype, tmp_path), OnDevice(layer, form, dtype, tmp_path / "there")
    surgery.save(near.ours(), tmp_path / "adapter")
    merged = [held(surgery.merge(cell.laid(tmp_path / "adapter"))) for cell in (near, far)]
    assert merged[0] == merged[1]
    assert merged[0] != held(near.laid(tmp_path / "adapter"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@each_pair
def test_peft_gives_the_same_outputs(layer: str, form: str, dtype: torch.dtype, tmp_path: Path) -> None:
    """by_peft raises an AssertionError where it runs and its outputs are others."""
    if DEVICE == "cpu" or form == "QALoRA":  # whose stand-in for a layer of GPTQ is of this machine
        return
    told = by_peft(OnDevice(layer, form, dtype, tmp_path / "there"))
    assert told == by_peft(Cell(layer, form, dtype, tmp_path))
