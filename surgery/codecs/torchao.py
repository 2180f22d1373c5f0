"""torchao's int8 and fp8, as transformers writes them: the arithmetic of compressed-tensors' ints, and of fp8.

w = (code - zero point) * scale, or float * scale, in float32. What else the file's metadata says of a weight, such as
how activations are quantized, does not change its value. https://github.com/pytorch/ao
"""

from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from surgery.codecs.compressed_ints import IntQuantized
from surgery.codecs.fp8_block import FLOATS, SCALES, Fp8Block
from surgery.core.codec import Codec, Headers, Packed, Settings, Shape
from surgery.errors import FormatError, printable

METHOD = "torchao"
_TYPES = (
    "Int8WeightOnlyConfig",
    "Int8DynamicActivationInt8WeightConfig",
    "Float8WeightOnlyConfig",
    "Float8DynamicActivationFloat8WeightConfig",
)
_STATIC = ("act_quant_scale", "act_quant_zero_point")  # what inputs are quantized by; they go with the codes
_OTHERS = ("act_pre_scale", "per_tensor_scale", "scale_and_zero")
_ROLES = {"qdata": "weight", "scale": "weight_scale", "zero_point": "weight_zero_point"}
_OWN = {theirs: own for own, theirs in _ROLES.items()}


def refuse_unsupported(config: Mapping[str, Any]) -> None:
    """FormatError, with the next step, where the quantization_config asks for what no codec here does."""
    told = config.get("quant_type")
    kinds = list(told.values()) if isinstance(told, dict) else [told]
    for one in kinds:
        name = one.get("_type") if isinstance(one, dict) else one
        data = one.get("_data") if isinstance(one, dict) else None
        if name not in _TYPES or (isinstance(data, dict) and data.get("reduce_range")):
            raise FormatError(
                f"torchao's {printable(name)} is not supported; {', '.join(_TYPES)} without reduce_range is wanted; "
                "load it with transformers, dequantize() it, and save it plainly"
            )


class _Torchao(Codec):
    """Tensors of other names, by the codec that has their arithmetic."""

    inner: ClassVar[Codec]
    codes: ClassVar[tuple[torch.dtype, ...]]
    endings: ClassVar[Mapping[str, str]] = {role: f"._weight_{role}" for role in (*_ROLES, *_STATIC, *_OTHERS)}

    def claims(self, headers: Headers) -> bool:
        return headers.get("qdata", (None,))[0] in self.codes and "scale" in headers

    def read(self, headers: Headers, config: Settings, load: Callable[[str], Tensor]) -> Settings:
        for role in _OTHERS:
            if role in headers:
                raise FormatError(f"torchao's {role} is not supported; dequantize it first")
        told = {key: value for key, value in config.items() if key in {"weight_block_size", "num_bits"}}
        return self.inner.read(_renamed(headers, _ROLES), told, lambda role: load(_OWN[role]))

    def shape(self, headers: Headers, settings: Settings) -> Shape:  # noqa: ARG002  # it is that of the codes
        return headers["qdata"][1]

    def dtype(self, settings: Settings) -> torch.dtype | None:
        return self.inner.dtype(settings)

    def spans(self, headers: Headers, settings: Settings, rows: slice) -> Mapping[str, slice]:
        return _renamed(self.inner.spans(_renamed(headers, _ROLES), settings, rows), _OWN)

    def decode(self, packed: Packed, dtype: torch.dtype) -> Tensor:
        return self.inner.decode(_theirs(packed), dtype)

    def encode(self, weight: Tensor, like: Packed) -> Packed:
        codes = self.inner.encode(weight, _theirs(like)).tensors["weight"]
        return like._replace(tensors={**like.tensors, "qdata": codes})

    def grid(self, packed: Packed) -> tuple[Tensor, Tensor]:
        return self.inner.grid(_theirs(packed))


class TorchaoInt8(_Torchao):
    """Codes [out, in], scales and zero points [out, groups] or [out, 1]."""

    name = "torchao-int8"
    inner = IntQuantized()
    codes = (torch.int8,)

    def fresh(self, weight: Tensor, settings: Settings) -> Packed:
        """`settings`: group_size (-1, a row). By the largest of each group."""
        packed = self.inner.fresh(weight.to(torch.float32), {**settings, "symmetric": True})
        zeros = torch.zeros_like(packed.tensors["weight_scale"], dtype=torch.int8)
        return _ours(packed._replace(tensors={**packed.tensors, "weight_zero_point": zeros}))


class TorchaoFp8(_Torchao):
    """Codes [out, in], scales [out, 1], [1, 1] or by block."""

    name = "torchao-fp8"
    inner = Fp8Block()
    codes = FLOATS

    def fresh(self, weight: Tensor, settings: Settings) -> Packed:  # noqa: ARG002  # it has none
        """By the largest of each row."""
        rows = self.inner.fresh(weight, {"weight_block_size": (1, max(weight.shape[-1], 1))})
        return _ours(rows._replace(tensors={"weight": rows.tensors["weight"], "weight_scale": rows.tensors[SCALES[0]]}))


def _renamed(values: Mapping[str, Any], names: Mapping[str, str]) -> dict[str, Any]:
    """Those that have a name there."""
    return {names[role]: one for role, one in values.items() if role in names}


def _theirs(packed: Packed) -> Packed:
    return packed._replace(tensors=_renamed(packed.tensors, _ROLES))


def _ours(packed: Packed) -> Packed:
    return packed._replace(tensors=_renamed(packed.tensors, _OWN))
