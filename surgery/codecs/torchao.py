"""torchao's int8 and fp8, as transformers writes them: the arithmetic of compressed-tensors' ints, and of fp8.

w = (code - zero point) * scale, or float * scale, in float32. What else the file's metadata says of a weight, such as
how activations are quantized, does not change its value. https://github.com/pytorch/ao
"""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from surgery.codecs.bnb4_fresh import DTYPES
from surgery.codecs.compressed_ints import IntQuantized
from surgery.codecs.fp8_block import FLOATS, Fp8Block
from surgery.core.arithmetic import divided
from surgery.core.codec import Codec, Headers, Packed, Settings, Shape, TiledCodec, on_meta
from surgery.errors import ConfigError, FormatError, printable

METHOD = "torchao"
_TYPES = (
    "Int8WeightOnlyConfig",
    "Int8DynamicActivationInt8WeightConfig",
    "Float8WeightOnlyConfig",
    "Float8DynamicActivationFloat8WeightConfig",
)
_STATIC = ("act_quant_scale", "act_quant_zero_point")  # what inputs are quantized by; they go with the codes
_OTHERS = ("act_pre_scale", "per_tensor_scale", "scale_and_zero")
_BY_ROWS = {"granularity": {"_type": "PerRow", "_version": 1, "_data": {"dim": -1}}, "set_inductor_config": True}
_LARGEST = torch.finfo(FLOATS[0]).max
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


class _Torchao(TiledCodec):
    """Tensors of other names, by the codec that has their arithmetic."""

    inner: ClassVar[Codec]
    codes: ClassVar[tuple[torch.dtype, ...]]
    config: ClassVar[Mapping[str, Any]]  # what a quantization_config says of the type
    tensor: ClassVar[Mapping[str, Any]]  # what a header says of each weight
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

    def told(self, settings: Settings, dtype: torch.dtype, plainly: Sequence[str]) -> Settings | None:  # noqa: ARG002
        kind = {"_type": self.config["_type"], "_version": 2, "_data": {**_BY_ROWS, **self.config["_data"]}}
        told = {"quant_method": METHOD, "quant_type": {"default": kind}, "modules_to_not_convert": list(plainly)}
        return told | dict.fromkeys(("include_input_output_embeddings", "untie_embedding_weights"), False)

    def metadata(self, weights: Mapping[str, tuple[Shape, torch.dtype]]) -> Mapping[str, str]:
        """Without which transformers finds no weight of torchao."""
        told = {name: self._tells(shape, dtype) for name, (shape, dtype) in weights.items()}
        return {**told, "tensor_names": json.dumps(list(told))}

    def _tells(self, shape: Shape, dtype: torch.dtype) -> str:
        kind = {"_type": "torch.dtype", "_data": str(dtype).removeprefix("torch.")}
        data = {"block_size": [1, shape[1]], "act_quant_kwargs": None, **self.tensor["_data"], "dtype": kind}
        return json.dumps({**self.tensor, "_data": data})

    def grid(self, packed: Packed) -> tuple[Tensor, Tensor]:
        return self.inner.grid(_theirs(packed))


class TorchaoInt8(_Torchao):
    """Codes [out, in], scales and zero points [out, groups] or [out, 1]."""

    name = "torchao-int8"
    inner = IntQuantized()
    codes = (torch.int8,)
    config: ClassVar[Mapping[str, Any]] = {"_type": "Int8WeightOnlyConfig", "_data": {"group_size": None}}
    tensor: ClassVar[Mapping[str, Any]] = {
        "_type": "Int8Tensor",
        "_data": {"reduce_range": False},
        "_tensor_data_names": ["qdata", "scale", "zero_point"],
    }

    def scales(self, tiles: Iterable[Tensor], shape: Shape, dtype: torch.dtype, settings: Settings) -> Packed:
        """`settings`: group_size (-1, a row). By the largest of each group, half of 255 steps away."""
        _refuse_unlike(self.name, shape, dtype)
        group = settings.get("group_size", -1)
        width = shape[1] if group == -1 else group
        if type(width) is not int or width < 1 or shape[1] % width:
            raise ConfigError(f"{self.name}: {list(shape)} by groups of {printable(group)}; whole groups are wanted")
        tops = torch.cat([tile.reshape(len(tile), -1, width).abs().amax(dim=2) for tile in tiles])
        scales = divided(tops, 255 / 2).clamp_(min=torch.finfo(torch.float32).eps).to(torch.float32)
        tensors = {"qdata": on_meta(shape, torch.int8), "scale": scales}
        tensors["zero_point"] = torch.zeros_like(scales, dtype=torch.int8)
        return Packed(tensors, {"num_bits": 8, "dtype": "float32"})

    def coded(self, weight: Tensor, by: Packed) -> Packed:
        factors = (1.0 / by.tensors["scale"]).unsqueeze(2)  # [out, groups, 1]
        codes = (weight.reshape(len(weight), factors.shape[1], -1).to(torch.float32) * factors).round_()
        held = codes.clamp_(-128, 127).to(torch.int8).view(weight.shape)
        return by._replace(tensors={**by.tensors, "qdata": held})


class TorchaoFp8(_Torchao):
    """Codes [out, in], scales [out, 1], [1, 1] or by block."""

    name = "torchao-fp8"
    inner = Fp8Block()
    codes = FLOATS
    config: ClassVar[Mapping[str, Any]] = {
        "_type": "Float8WeightOnlyConfig",
        "_data": {"weight_dtype": {"_type": "torch.dtype", "_data": "float8_e4m3fn"}},
    }
    tensor: ClassVar[Mapping[str, Any]] = {
        "_type": "Float8Tensor",
        "_data": {"mm_config": None, "kernel_preference": {"_type": "KernelPreference", "_data": "AUTO"}},
        "_tensor_data_names": ["qdata", "scale"],
    }

    def scales(self, tiles: Iterable[Tensor], shape: Shape, dtype: torch.dtype, settings: Settings) -> Packed:  # noqa: ARG002  # it has none
        """By the largest of each row; one of zeros is held as such, where torchao would make NaNs of it."""
        _refuse_unlike(self.name, shape, dtype)
        tops = torch.cat([tile.abs().amax(dim=1, keepdim=True) for tile in tiles])
        scales = divided(tops, _LARGEST).to(torch.float32)
        tensors = {"qdata": on_meta(shape, FLOATS[0]), "scale": torch.where(scales == 0, 1.0, scales)}
        return Packed(tensors, {"weight_block_size": (1, shape[1])})

    def coded(self, weight: Tensor, by: Packed) -> Packed:
        held = (weight.to(torch.float32) / by.tensors["scale"]).clamp_(-_LARGEST, _LARGEST)
        return by._replace(tensors={**by.tensors, "qdata": held.to(FLOATS[0])})


def _refuse_unlike(name: str, shape: Shape, dtype: torch.dtype) -> None:
    """ConfigError for what torchao holds no weight of."""
    if len(shape) != 2 or dtype not in DTYPES.values():
        found = f"{list(shape)} in {str(dtype).removeprefix('torch.')}"
        raise ConfigError(f"{name}: {found}; a matrix in {', '.join(DTYPES)} is wanted")


def _renamed(values: Mapping[str, Any], names: Mapping[str, str]) -> dict[str, Any]:
    """Those that have a name there."""
    return {names[role]: one for role, one in values.items() if role in names}


def _theirs(packed: Packed) -> Packed:
    return packed._replace(tensors=_renamed(packed.tensors, _ROLES))
