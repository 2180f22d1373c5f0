"""Lazy: tensors that are at hand only while they are written, and files of safetensors' format made of them."""

import hashlib
from collections.abc import Callable, Mapping
from typing import NamedTuple

from torch import Tensor

from surgery.core.site import TensorInfo
from surgery.io.header import encode_header
from surgery.io.octets import octets
from surgery.io.staging import Staging


class Lazy(NamedTuple):
    """A tensor that is yet to be made."""

    info: TensorInfo
    load: Callable[[], Tensor]


def write_tensors(staging: Staging, file: str, tensors: Mapping[str, Lazy]) -> str:
    """A file of safetensors' format, of which memory holds one tensor at a time; returns its sha256."""
    infos = [one.info for one in tensors.values()]
    raw = encode_header(infos, {"format": "pt"})
    sha256 = hashlib.sha256(raw)
    with staging.file(file, len(raw) + sum(info.nbytes for info in infos)) as staged:
        staged.write(raw)
        for one in tensors.values():
            values = one.load().detach().cpu().contiguous()
            sha256.update(octets(values))
            staged.write(octets(values))
            del values  # before the next is made
    return sha256.hexdigest()
