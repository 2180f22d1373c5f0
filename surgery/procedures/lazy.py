"""Lazy: tensors that are at hand only while they are written, and files of safetensors' format made of them."""

import hashlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from torch import Tensor

from surgery.core.arithmetic import memory_of
from surgery.core.site import TensorInfo
from surgery.hosts.checkpoint import SINGLE, Checkpoint
from surgery.io.header import encode_header
from surgery.io.octets import octets, tensor_from
from surgery.io.staging import Staging


class Lazy(NamedTuple):
    """A tensor that is yet to be made."""

    info: TensorInfo
    load: Callable[[], Tensor]


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


def write_tensors(staging: Staging, file: str, tensors: Mapping[str, Lazy]) -> str:
    """A file of safetensors' format; returns its sha256."""
    infos = [one.info for one in tensors.values()]
    raw = encode_header(infos, {"format": "pt"})
    sha256 = hashlib.sha256(raw)
    with staging.file(file, len(raw) + sum(info.nbytes for info in infos)) as staged:
        staged.write(raw)
        for one in tensors.values():
            values = one.load().detach().cpu().contiguous()
            sha256.update(octets(values))
            staged.write(octets(values))
    return sha256.hexdigest()


def _at_hand(name: str, values: Tensor) -> Lazy:
    return Lazy(TensorInfo(name, values.dtype, tuple(values.shape)), lambda: values)
