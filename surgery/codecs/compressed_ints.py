"""compressed-tensors' whole numbers of 4 or 8 bits, times a scale for each group of inputs, each row, or for all.

w = (code - zero point) * scale, in float32. `pack-quantized` puts the codes, with half their range added, into the bits
of int32, the lowest first; `int-quantized` has a byte for each. Scales are in the dtype that the weights were in.
https://github.com/vllm-project/compressed-tensors
"""

import math
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from surgery.codecs.bnb4_fresh import DTYPES
from surgery.codecs.compressed_config import told_values
from surgery.core.codec import Codec, Headers, Packed, Settings, Shape, differs
from surgery.errors import ConfigError, FormatError, printable

BITS = (4, 8)
GROUP = 128
_WORD = 32  # bits of what codes are packed into
_SCALE, _ZERO, _ORDER = "weight_scale", "weight_zero_point", "weight_g_idx"
# What activations are quantized by; it goes with the codes.
_BESIDE = (_SCALE, _ZERO, _ORDER, "input_scale", "input_zero_point", "output_scale", "output_zero_point")


class PackQuantized(Codec):
    """Codes [out, words], scales [out, groups], [out, 1] or [1], zero points packed along out, and the shape."""

    name = "pack-quantized"
    endings: ClassVar[Mapping[str, str]] = {
        role: f".{role}" for role in ("weight_packed", *_BESIDE, "weight_shape", "input_global_scale")
    }

    def claims(self, headers: Headers) -> bool:
        return headers.get("weight_packed", (None,))[0] == torch.int32 and {_SCALE, "weight_shape"} <= headers.keys()

    def read(self, headers: Headers, config: Settings, load: Callable[[str], Tensor]) -> Settings:
        (_, words), (_, extents) = headers["weight_packed"], headers["weight_shape"]
        shape = tuple(load("weight_shape").flatten().tolist()) if math.prod(extents) == len(words) else ()
        bits = _bits(words, shape, config)
        _check(headers, shape, bits)
        return {"num_bits": bits, "shape": list(shape), "dtype": _name(headers[_SCALE][0])}

    def shape(self, headers: Headers, settings: Settings) -> Shape:  # noqa: ARG002  # words may be wider than rows
        return tuple(settings["shape"])

    def dtype(self, settings: Settings) -> torch.dtype | None:
        return _told(settings)

    def spans(self, headers: Headers, settings: Settings, rows: slice) -> Mapping[str, slice]:
        per_word = _WORD // settings["num_bits"]
        found = {"weight_packed": rows} | _spans(headers, settings["shape"][0], rows)
        if headers.get(_ZERO, (None,))[0] == torch.int32:
            found[_ZERO] = slice(rows.start // per_word, -(-rows.stop // per_word))
        return found

    def decode(self, packed: Packed, dtype: torch.dtype) -> Tensor:
        return _parts(packed).values().to(dtype)

    def encode(self, weight: Tensor, like: Packed) -> Packed:
        held, bits = like.tensors["weight_packed"], like.settings["num_bits"]
        codes = _unpacked(held, bits)
        found = codes[:, : like.settings["shape"][1]]
        found.copy_(_parts(like).nearest(weight, differs(weight, self.decode(like, weight.dtype))))
        return like._replace(tensors={**like.tensors, "weight_packed": _packed(codes, bits)})

    def fresh(self, weight: Tensor, settings: Settings) -> Packed:
        """`settings`: num_bits (4), group_size (128; -1 for a row), symmetric (true). Scales by the least and the
        largest of each group, as compressed-tensors has them."""
        bits, parts = settings.get("num_bits", 4), _fresh(weight, settings)
        tensors = {
            "weight_packed": _packed(_padded(parts.codes, bits), bits),
            _SCALE: parts.scales.to(weight.dtype),
            "weight_shape": torch.tensor(weight.shape),
        }
        if not settings.get("symmetric", True):
            tensors[_ZERO] = _packed(_padded(parts.zeros.T, bits), bits).T.contiguous()
        told = {"num_bits": bits, "shape": list(weight.shape), "dtype": _name(weight.dtype)}
        return Packed(tensors, told)

    def grid(self, packed: Packed) -> tuple[Tensor, Tensor]:
        return _parts(packed).grid()


class IntQuantized(Codec):
    """Codes [out, in] in bytes, scales [out, groups], [out, 1] or [1], and zero points of their shape."""

    name = "int-quantized"
    endings: ClassVar[Mapping[str, str]] = {role: f".{role}" for role in ("weight", *_BESIDE)}

    def claims(self, headers: Headers) -> bool:
        return headers.get("weight", (None,))[0] == torch.int8 and _SCALE in headers

    def read(self, headers: Headers, config: Settings, load: Callable[[str], Tensor]) -> Settings:  # noqa: ARG002
        bits = {*told_values(config, "num_bits", self.name)} or {8}
        if len(bits) > 1 or not bits <= {*BITS}:
            raise FormatError(f"codes in bytes, of {printable(sorted(map(str, bits)))} bits; 4 or 8 is wanted")
        _check(headers, headers["weight"][1], 8)
        return {"num_bits": bits.pop(), "dtype": _name(headers[_SCALE][0])}

    def shape(self, headers: Headers, settings: Settings) -> Shape:  # noqa: ARG002  # it is that of the codes
        return headers["weight"][1]

    def dtype(self, settings: Settings) -> torch.dtype | None:
        return _told(settings)

    def spans(self, headers: Headers, settings: Settings, rows: slice) -> Mapping[str, slice]:  # noqa: ARG002
        return {"weight": rows} | _spans(headers, headers["weight"][1][0], rows)

    def decode(self, packed: Packed, dtype: torch.dtype) -> Tensor:
        return _parts(packed).values().to(dtype)

    def encode(self, weight: Tensor, like: Packed) -> Packed:
        codes = _parts(like).nearest(weight, differs(weight, self.decode(like, weight.dtype)))
        return like._replace(tensors={**like.tensors, "weight": codes.to(torch.int8)})

    def fresh(self, weight: Tensor, settings: Settings) -> Packed:
        """`settings`: group_size (-1, a row), symmetric (true)."""
        told = {"num_bits": 8, "group_size": -1, **settings}
        parts = _fresh(weight, told)
        tensors = {"weight": parts.codes.to(torch.int8), _SCALE: parts.scales.to(weight.dtype)}
        if not told.get("symmetric", True):
            tensors[_ZERO] = parts.zeros.to(torch.int8)
        return Packed(tensors, {"num_bits": told["num_bits"], "dtype": _name(weight.dtype)})

    def grid(self, packed: Packed) -> tuple[Tensor, Tensor]:
        return _parts(packed).grid()


class _Parts(NamedTuple):
    """Codes [out, in], and the scales and zero points of their groups [out or 1, groups]."""

    codes: Tensor  # int16
    scales: Tensor  # float32
    zeros: Tensor  # int16
    bits: int

    def values(self, step: int = 0) -> Tensor:
        """float32 [out, in], of the codes or of those next to them."""
        moved = (self.codes + step).clamp(*_ends(self.bits)) if step else self.codes
        return self._grouped(moved).sub(self.zeros.unsqueeze(2)).mul(self.scales.unsqueeze(2)).view(self.codes.shape)

    def nearest(self, weight: Tensor, changed: Tensor) -> Tensor:
        """The codes, and where `changed` those of the nearest values."""
        scales = self.scales.to(torch.float64).unsqueeze(2)
        wanted = (self._grouped(weight).to(torch.float64) / scales).round_() + self.zeros.unsqueeze(2)
        held = changed & (scales != 0).expand(self._grouped(weight).shape).reshape(weight.shape)
        codes = wanted.clamp_(*_ends(self.bits)).view(weight.shape)
        return torch.where(held, codes.nan_to_num(0.0).to(torch.int16), self.codes)

    def grid(self) -> tuple[Tensor, Tensor]:
        pair = [self.values(step).to(torch.float64) for step in (-1, 1)]
        return torch.minimum(*pair), torch.maximum(*pair)  # a scale may be below zero

    def _grouped(self, values: Tensor) -> Tensor:
        """[out, groups, in of a group]."""
        return values.reshape(len(values), self.scales.shape[1], -1)


def _parts(packed: Packed) -> _Parts:
    held, settings = packed.tensors, packed.settings
    bits = settings["num_bits"]
    if "weight" in held:
        codes = held["weight"].to(torch.int16)
    else:
        codes = _unpacked(held["weight_packed"], bits)[:, : settings["shape"][1]]
    scales = _matrix(held[_SCALE]).to(torch.float32)
    if _ZERO not in held:
        return _Parts(codes, scales, torch.zeros_like(scales, dtype=torch.int16), bits)
    if held[_ZERO].dtype != torch.int32:
        return _Parts(codes, scales, _matrix(held[_ZERO]).to(torch.int16), bits)
    zeros = _unpacked(held[_ZERO].T, bits).T
    first = 0 if packed.rows is None else packed.rows.start % (_WORD // bits)
    return _Parts(codes, scales, zeros[first : first + len(codes)], bits)


def _unpacked(words: Tensor, bits: int) -> Tensor:
    """The codes of rows of words, int16, those that fill the last word too."""
    octets = words.flatten().view(torch.uint8).view(len(words), -1)  # [out, bytes]
    codes = octets if bits == 8 else torch.stack([octets & 15, octets >> 4], dim=2).flatten(1)
    return codes.to(torch.int16) - (1 << bits - 1)


def _packed(codes: Tensor, bits: int) -> Tensor:
    """Rows of whole words."""
    octets = (codes + (1 << bits - 1)).to(torch.uint8)
    joined = octets if bits == 8 else octets[:, ::2] | octets[:, 1::2] << 4
    return joined.flatten().view(torch.int32).view(len(codes), -1)


def _padded(codes: Tensor, bits: int) -> Tensor:
    """To whole words, by bits of zero."""
    return torch.nn.functional.pad(codes, (0, -codes.shape[1] % (_WORD // bits)), value=-(1 << bits - 1))


def _ends(bits: int) -> tuple[int, int]:
    return -(1 << bits - 1), (1 << bits - 1) - 1


def _matrix(values: Tensor) -> Tensor:
    return values if values.dim() == 2 else values.view(-1, 1)


def _spans(headers: Headers, count: int, rows: slice) -> dict[str, slice]:
    """Of scales and zero points, where each row has its own."""
    return {role: rows for role in (_SCALE, _ZERO) if role in headers and headers[role][1][:1] == (count,)}


def _told(settings: Settings) -> torch.dtype | None:
    """What the weight was in, by its scales; those of float32 stand beside weights of any dtype."""
    return None if settings["dtype"] == "float32" else DTYPES[settings["dtype"]]


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _bits(words: Shape, shape: Shape, config: Settings) -> int:
    """Of a code. FormatError where the tensors' shapes and config.json allow none of BITS, or both."""
    told = told_values(config, "num_bits", PackQuantized.name) or BITS
    if len(shape) == len(words) == 2:
        fit = {bits for bits in BITS if bits in told and words == (shape[0], -(-shape[1] * bits // _WORD))}
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
    (dtype, scales), name = headers[_SCALE], _name(headers[_SCALE][0])
    whole, groups = scales in {(), (1,), (1, 1)}, scales[1] if len(scales) == 2 else 1
    fits = len(shape) == 2 and (whole or (scales[0] == shape[0] and len(scales) <= 2))
    if not fits or not groups or shape[1] % groups or name not in DTYPES or dtype != DTYPES[name]:
        raise FormatError(
            f"codes of {list(shape)} with scales {list(scales)} in {name}; one for each group of inputs, each row, or "
            f"for all, in {', '.join(DTYPES)}, is wanted; this layout is not supported"
        )
    if _ZERO in headers:
        dtype, zeros = headers[_ZERO]
        packed = (-(-shape[0] * bits // _WORD), groups)
        if not ((dtype == torch.int8 and zeros == scales) or (dtype == torch.int32 and zeros == packed)):
            raise FormatError(
                f"zero points {list(zeros)} in {_name(dtype)} beside scales {list(scales)}; one for each scale is "
                "wanted; this layout is not supported"
            )


def _fresh(weight: Tensor, settings: Settings) -> _Parts:
    """ConfigError for what compressed-tensors makes of no weight."""
    bits, group = settings.get("num_bits", 4), settings.get("group_size", GROUP)
    width = weight.shape[1] if group == -1 and weight.dim() == 2 else group
    if weight.dim() != 2 or bits not in BITS or not _divides(width, weight) or _name(weight.dtype) not in DTYPES:
        raise ConfigError(
            f"int{printable(bits)}: {list(weight.shape)} in {_name(weight.dtype)} by groups of {printable(group)}; a "
            f"matrix in {', '.join(DTYPES)}, whose inputs are a multiple of the group, in 4 or 8 bits, is wanted"
        )
    grouped = weight.view(len(weight), -1, width)
    low, high = grouped.amin(dim=2).clamp(max=0), grouped.amax(dim=2).clamp(min=0)
    scales, zeros = _scales(low, high, bits, bool(settings.get("symmetric", True)))
    codes = (grouped / scales.unsqueeze(2) + zeros.unsqueeze(2).to(weight.dtype)).clamp(*_ends(bits)).round()
    return _Parts(codes.view(weight.shape).to(torch.int16), scales, zeros, bits)


def _scales(low: Tensor, high: Tensor, bits: int, symmetric: bool) -> tuple[Tensor, Tensor]:
    """In the weight's dtype, as compressed-tensors computes them."""
    least, range_ = -(1 << bits - 1), (1 << bits) - 1
    scales = torch.maximum(-low, high) / (range_ / 2) if symmetric else (high - low) / range_
    zeros = torch.zeros_like(scales) if symmetric else (least - low / scales).clamp(*_ends(bits))
    scales = torch.where(scales == 0, torch.finfo(scales.dtype).eps, scales)
    return scales, zeros.round().nan_to_num(0.0).to(torch.int16)


def _divides(width: Any, weight: Tensor) -> bool:
    return type(width) is int and width > 0 and weight.shape[1] % width == 0
