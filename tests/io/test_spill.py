"""Spill: the bytes of adapter_bytes, of tensors that came in any order and are not held."""

import weakref
from pathlib import Path

import pytest
import torch

from surgery.adapters.peft import TENSORS, adapter_bytes
from surgery.adapters.spill import Spill
from surgery.io.staging import Staging

TENSORS_MADE = {
    "b.lora_A.weight": torch.arange(6.0).view(2, 3),
    "a.lora_B.weight": torch.arange(12, dtype=torch.bfloat16).view(4, 3).T,  # not contiguous
    "c.weight": torch.empty(0, 5),
    "a.lora_A.weight": torch.randn(700, 600, dtype=torch.float64),  # more than is copied at a time
}


@pytest.mark.parametrize("order", [list(TENSORS_MADE), list(reversed(TENSORS_MADE))], ids=["made", "reversed"])
def test_the_file_is_the_one_that_adapter_bytes_gives(order: list[str], tmp_path: Path) -> None:
    with Staging(tmp_path / "out") as staging, Spill(staging) as spill:
        spill.add("a.lora_A.weight", torch.zeros(3))  # another of the name follows
        for name in order:
            spill.add(name, TENSORS_MADE[name])
        spill.write()
    assert (tmp_path / "out" / TENSORS).read_bytes() == adapter_bytes(TENSORS_MADE)
    assert [path.name for path in (tmp_path / "out").iterdir()] == [TENSORS]


def test_no_tensor_is_held(tmp_path: Path) -> None:
    values = torch.ones(3)
    there = weakref.ref(values)
    with Staging(tmp_path / "out") as staging, Spill(staging) as spill:
        spill.add("a", values)
        del values
        assert there() is None
        spill.write()
