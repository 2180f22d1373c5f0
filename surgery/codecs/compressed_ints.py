"""compressed-tensors' whole numbers of 4 or 8 bits, times a scale for each group of inputs, each row, or for all.

w = (code - zero point) * scale, in float32. `pack-quantized` puts the codes, with half their range added, into the bits
of int32, the lowest first; `int-quantized` has a byte for each. Scales are in the dtype that the weights were in.
https://github.com/vllm-project/compressed-tensors
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from surgery.codecs.bnb4_fresh import DTYPES
from surgery.codecs.compressed_config import tokens_of, told_of, told_values
from surgery.codecs.int_groups import (
    BITS,
    GROUP,
    WORD,
    Groups,
    Scales,
    dtype_name,
    fresh_codes,
    fresh_scales,
    packed_words,
    padded,
    unpacked,
)
from surgery.core.codec import Headers, Packed, Settings, Shape, TiledCodec, differs, on_meta
from surgery.errors import FormatError, printable

_SCALE, _ZERO, _ORDER = "weight_scale", "weight_zero_point", "weight_g_idx"
# What activations are quantized by; it goes with the codes.
_BESIDE = (_SCALE, _ZERO, _ORDER, "input_scale", "input_zero_point", "output_scale", "output_zero_point")

_ROWS: Settings = {"num_bits": 8, "group_size": -1}


class PackQuantized(TiledCodec):
    """Codes [out, words], scales [out, groups], [out, 1] or [1], zero points packed along out, and the shape."""

    name = "pack-quantized"
    endings: ClassVar[Mapping[str, str]] = {
        role: f".{role}" for role in ("weight_packed", *_BESIDE, "weight_shape", "input_global_scale")
    }

    def claims(self, headers: Headers) -> bool:
        return headers.get("weight_packed", (None,))[0] == torch.int32 and {_SCALE, "weight_shape"} <= headers.keys()

    def read(self, headers: Headers, config: Settings, load: Callable[[str], Tensor]) -> Settings:
        (_, words), told = headers["weight_packed"], headers["weight_shape"]
        whole = told[0] in {torch.int32, torch.int64} and math.prod(told[1]) == len(words)
        shape = tuple(load("weight_shape").flatten().tolist()) if whole else ()
        bits = _bits(words, shape, config)
        _check(headers, shape, bits)
        return {"num_bits": bits, "shape": list(shape), "dtype": dtype_name(headers[_SCALE][0])}

    def shape(self, headers: Headers, settings: Settings) -> Shape:  # noqa: ARG002  # words may be wider than rows
        return tuple(settings["shape"])

    def dtype(self, settings: Settings) -> torch.dtype | None:
        return _told(settings)

    def spans(self, headers: Headers, settings: Settings, rows: slice) -> Mapping[str, slice]:
        per_word = WORD // settings["num_bits"]
        found = {"weight_packed": rows} | _spans(headers, settings["shape"][0], rows)
        if headers.get(_ZERO, (None,))[0] == torch.int32:
            found[_ZERO] = slice(rows.start // per_word, -(-rows.stop // per_word))
        return found

    def decode(self, packed: Packed, dtype: torch.dtype) -> Tensor:
        return _groups(packed).values().to(dtype)

    def encode(self, weight: Tensor, like: Packed) -> Packed:
        held, bits = like.tensors["weight_packed"], like.settings["num_bits"]
        codes = unpacked(held, bits)
        found = codes[:, : like.settings["shape"][1]]
        found.copy_(_groups(like).nearest(weight, differs(weight, self.decode(like, weight.dtype))))
        return like._replace(tensors={**like.tensors, "weight_packed": packed_words(codes, bits)})

    def scales(self, tiles: Iterable[Tensor], shape: Shape, dtype: torch.dtype, settings: Settings) -> Packed:
        """`settings`: num_bits (4), group_size (128; -1 for a row), symmetric (true)."""
        bits, found = settings.get("num_bits", 4), fresh_scales(tiles, shape, dtype, settings)
        codes = on_meta((shape[0], -(-shape[1] * bits // WORD)), torch.int32)
        tensors = {"weight_packed": codes, _SCALE: found.scales, "weight_shape": torch.tensor(shape)}
        if not settings.get("symmetric", True):
            tensors[_ZERO] = packed_words(padded(found.zeros.T, bits), bits).T.contiguous()
        return Packed(tensors, {"num_bits": bits, "shape": list(shape), "dtype": dtype_name(dtype)})

    def coded(self, weight: Tensor, by: Packed) -> Packed:
        bits = by.settings["num_bits"]
        codes = packed_words(padded(fresh_codes(weight, _scales(by, len(weight)), bits), bits), bits)
        return by._replace(tensors={**by.tensors, "weight_packed": codes})

    def told(self, settings: Settings, dtype: torch.dtype, plainly: Sequence[str]) -> Settings | None:  # noqa: ARG002
        return told_of(self.name, _weights({"num_bits": 4, "group_size": GROUP, **settings}), plainly)

    def grid(self, packed: Packed) -> tuple[Tensor, Tensor]:
        return _groups(packed).grid()


class IntQuantized(TiledCodec):
    """Codes [out, in] in bytes, scales [out, groups], [out, 1] or [1], and zero points of their shape."""

    name = "int-quantized"
    endings: ClassVar[Mapping[str, str]] = {role: f".{role}" for role in ("weight", *_BESIDE)}

    def claims(self, headers: Headers) -> bool:
        return headers.get("weight", (None,))[0] == torch.int8 and _SCALE in headers

    def read(self, headers: Headers, config: Settings, load: Callable[[str], Tensor]) -> Settings:  # noqa: ARG002
        told = told_values(config, "num_bits", self.name) or [8]
        if told[0] not in BITS or any(one != told[0] for one in told):
            raise FormatError(f"codes in bytes, of {printable(told)} bits; either 4 or 8 of all layers is wanted")
        _check(headers, headers["weight"][1], 8)
        return {"num_bits": told[0], "dtype": dtype_name(headers[_SCALE][0])}

    def shape(self, headers: Headers, settings: Settings) -> Shape:  # noqa: ARG002  # it is that of the codes
        return headers["weight"][1]

    def dtype(self, settings: Settings) -> torch.dtype | None:
        return _told(settings)

    def spans(self, headers: Headers, settings: Settings, rows: slice) -> Mapping[str, slice]:  # noqa: ARG002
        return {"weight": rows} | _spans(headers, headers["weight"][1][0], rows)

    def decode(self, packed: Packed, dtype: torch.dtype) -> Tensor:
        return _groups(packed).values().to(dtype)

    def encode(self, weight: Tensor, like: Packed) -> Packed:
        codes = _groups(like).nearest(weight, differs(weight, self.decode(like, weight.dtype)))
        return like._replace(tensors={**like.tensors, "weight": codes.to(torch.int8)})

    def scales(self, tiles: Iterable[Tensor], shape: Shape, dtype: torch.dtype, settings: Settings) -> Packed:
        """`settings`: num_bits (8), group_size (-1, a row), symmetric (true)."""
        told = {**_ROWS, **settings}
        found = fresh_scales(tiles, shape, dtype, told)
        tensors = {"weight": on_meta(shape, torch.int8), _SCALE: found.scales}
        if not told.get("symmetric", True):
            tensors[_ZERO] = found.zeros.to(torch.int8)
        return Packed(tensors, {"num_bits": told["num_bits"], "dtype": dtype_name(dtype)})

    def coded(self, weight: Tensor, by: Packed) -> Packed:
        codes = fresh_codes(weight, _scales(by, len(weight)), by.settings["num_bits"])
        return by._replace(tensors={**by.tensors, "weight": codes.to(torch.int8)})

    def told(self, settings: Settings, dtype: torch.dtype, plainly: Sequence[str]) -> Settings | None:  # noqa: ARG002
        return told_of(self.name, _weights({**_ROWS, **settings}), plainly, tokens_of("int"))

    def grid(self, packed: Packed) -> tuple[Tensor, Tensor]:
        return _groups(packed).grid()


def _weights(settings: Settings) -> dict[str, Any]:
    """What a quantization_config says of them."""
    group, symmetric = settings["group_size"], settings.get("symmetric", True)
    told = {"num_bits": settings["num_bits"], "type": "int", "group_size": group, "symmetric": symmetric}
    return told | {"strategy": "channel" if group == -1 else "group"}


def _groups(packed: Packed) -> Groups:
    held, settings = packed.tensors, packed.settings
    bits = settings["num_bits"]
    if "weight" in held:
        codes = held["weight"].to(torch.int16)
    else:
        codes = unpacked(held["weight_packed"], bits)[:, : settings["shape"][1]]
    by = _scales(packed, len(codes))
    return Groups(codes, by.scales.to(torch.float32), by.zeros, bits)


def _scales(packed: Packed, count: int) -> Scales:
    """Of so many rows; one row where it is for all."""
    held, bits = packed.tensors, packed.settings["num_bits"]
    scales = _matrix(held[_SCALE])
    if _ZERO not in held:
        return Scales(scales, torch.zeros_like(scales, dtype=torch.int16))
    if held[_ZERO].dtype != torch.int32:
        return Scales(scales, _matrix(held[_ZERO]).to(torch.int16))
    zeros = unpacked(held[_ZERO].T, bits).T
    first = 0 if packed.rows is None else packed.rows.start % (WORD // bits)
    return Scales(scales, zeros[first : first + count])


def _matrix(values: Tensor) -> Tensor:
    return values if values.dim() == 2 else values.view(-1, 1)


def _spans(headers: Headers, count: int, rows: slice) -> dict[str, slice]:
    """Of scales and zero points, where each row has its own."""
    return {role: rows for role in (_SCALE, _ZERO) if role in headers and headers[role][1][:1] == (count,)}


def _told(settings: Settings) -> torch.dtype | None:
    """What the weight was in, by its scales; those of float32 stand beside weights of any dtype."""
    return None if settings["dtype"] == "float32" else DTYPES[settings["dtype"]]


def _bits(words: Shape, shape: Shape, config: Settings) -> int:
    """Of a code. FormatError where the tensors' shapes and config.json allow none of BITS, or both."""
    told = told_values(config, "num_bits", PackQuantized.name) or BITS
    if len(shape) == len(words) == 2:
        fit = {bits for bits in BITS if bits in told and words == (shape[0], -(-shape[1] * bits // WORD))}
        if len(fit) == 1:
            return fit.pop()
    raise FormatError(
        f"packed codes {list(words)} of a weight {list(shape)} in {printable(list(told))} bits; a matrix whose codes "
        "of 4 or 8 bits fill its words is wanted; this layout is not supported"
    )


def _check(headers: Headers, shape: Shape, bits: int) -> None:
    """FormatError unless scales and zero points fit the weight."""
    if _ORDER in headers:
        raise FormatError(f"{_ORDER} puts its columns out of order (actorder), which is not supported; dequantize it")
    (dtype, scales), name = headers[_SCALE], dtype_name(headers[_SCALE][0])
    whole, groups = scales in {(), (1,), (1, 1)}, scales[1] if len(scales) == 2 else 1
    fits = len(shape) == 2 and min(shape) > 0 and (whole or (scales[0] == shape[0] and len(scales) <= 2))
    if not fits or not groups or shape[1] % groups or name not in DTYPES or dtype != DTYPES[name]:
        raise FormatError(
            f"codes of {list(shape)} with scales {list(scales)} in {name}; one for each group of inputs, each row, or "
            f"for all, in {', '.join(DTYPES)}, is wanted; this layout is not supported"
        )
    if _ZERO in headers:
        dtype, zeros = headers[_ZERO]
        packed = (-(-shape[0] * bits // WORD), groups)
        if not ((dtype == torch.int8 and zeros == scales) or (dtype == torch.int32 and zeros == packed)):
            raise FormatError(
                f"zero points {list(zeros)} in {dtype_name(dtype)} beside scales {list(scales)}; one for each scale is "
                "wanted; this layout is not supported"
            )
