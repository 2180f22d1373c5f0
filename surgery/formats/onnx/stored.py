"""stored: where the tensors of safetensors files lie, and initializers of a graph over them.

In a file a tensor begins at 8 + the header's length + its data_offset; external data may begin anywhere, so that
any file serves as it is.
"""

import hashlib
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch

from surgery.core.site import TensorInfo
from surgery.io.tensor_file import TensorFile

STORED = "weights/"  # so that no name of a tensor is one of an input or a node


class Stored(NamedTuple):
    """Where a tensor lies."""

    file: str
    start: int
    info: TensorInfo

    def as_bytes(self) -> "Stored":
        """The same bytes, as a row of them."""
        return self._replace(info=self.info._replace(dtype=torch.uint8, shape=(self.info.nbytes,)))


class Weights(NamedTuple):
    """The files beside a graph: their tensors by name, and the sha256 of each file's header."""

    stored: Mapping[str, Stored]
    headers: Mapping[str, str]

    def __or__(self, other: "Weights") -> "Weights":
        return Weights({**self.stored, **other.stored}, {**self.headers, **other.headers})


def weights_of(*files: TensorFile) -> Weights:
    """All tensors of the files."""
    stored = {name: Stored(one.path.name, at.start, at.info) for one in files for name, at in one.entries.items()}
    return Weights(stored, {one.path.name: hashlib.sha256(one.header.raw).hexdigest() for one in files})


def initializer(model: Any, found: Stored) -> Any:
    """The tensor as an initializer of its own name, once."""
    import onnx_ir as ir

    shape, name, dtype = ir.Shape(found.info.shape), STORED + found.info.name, onnx_dtype(found.info)
    if name in model.graph.initializers:
        return model.graph.initializers[name]
    stored = ir.Value(name=name, shape=shape, type=ir.TensorType(dtype))
    stored.const_value = ir.ExternalTensor(found.file, found.start, found.info.nbytes, dtype, shape=shape, name=name)
    model.graph.initializers.add(stored)
    return stored


def onnx_dtype(info: TensorInfo) -> Any:
    """What ONNX calls the dtype; None where it has no such."""
    import onnx_ir as ir

    names = {
        torch.float64: "DOUBLE",
        torch.float32: "FLOAT",
        torch.bfloat16: "BFLOAT16",
        torch.float16: "FLOAT16",
        torch.int64: "INT64",
        torch.int32: "INT32",
        torch.int16: "INT16",
        torch.int8: "INT8",
        torch.uint8: "UINT8",
        torch.bool: "BOOL",
    }
    name = names.get(info.dtype) if isinstance(info.dtype, torch.dtype) else None
    return None if name is None else ir.DataType[name]
