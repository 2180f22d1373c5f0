"""Tensors of a checkpoint, and of a model's state, as files are written of them."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from surgery.core.arithmetic import memory_of
from surgery.core.site import TensorInfo
from surgery.hosts.checkpoint import Checkpoint
from surgery.io.lazy import Lazy, write_tensors
from surgery.io.octets import tensor_from
from surgery.io.staging import Staging
from surgery.io.weight_files import SINGLE


def read_tensor(files: Checkpoint, name: str) -> Tensor:
    """A tensor of a checkpoint, in memory."""
    info = files.at[name][1].info
    return tensor_from(bytearray().join(files.read(name)), info.torch_dtype, info.shape)


def write_state(staging: Staging, state: Mapping[str, Tensor]) -> None:
    """The tensors as model.safetensors, those that share their memory once."""
    first: dict[Any, str] = {}
    for name, values in state.items():
        first.setdefault(memory_of(values) if values.numel() else name, name)
    write_tensors(staging, SINGLE, {name: _at_hand(name, state[name]) for name in first.values()})


def _at_hand(name: str, values: Tensor) -> Lazy:
    return Lazy(TensorInfo(name, values.dtype, tuple(values.shape)), lambda: values)
