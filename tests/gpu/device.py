"""The device that these tests run on, and what lies there."""

import os
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

# `SURGERY_TEST_DEVICE=cpu` runs the tests themselves where there is no GPU.
DEVICE = os.environ.get("SURGERY_TEST_DEVICE", "cuda")
IS_THERE = DEVICE == "cpu" or torch.cuda.is_available()

Placed = TypeVar("Placed", Tensor, nn.Module)


def there(value: Placed) -> Placed:
    """On the device."""
    return value.to(DEVICE)


def all_there(values: Any) -> Any:
    """The same of each tensor of a table."""
    return {key: there(value) for key, value in values.items()}


def here(value: Tensor) -> Tensor:
    """On the CPU, where it can be compared with what was made there."""
    return value.detach().cpu()


def held(model: nn.Module) -> dict[str, bytes]:
    """The bytes of all that a model holds, wherever that is."""
    return {name: octets(values) for name, values in model.state_dict().items()}


def octets(values: Tensor) -> bytes:
    return bytes(here(values).contiguous().flatten().view(torch.uint8).numpy())
