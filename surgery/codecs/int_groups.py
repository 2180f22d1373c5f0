"""Groups: whole numbers of 4 or 8 bits along the inputs, with a scale and a zero point for each group of them.

w = (code - zero point) * scale, in float32.
"""

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from surgery.codecs.bnb4_fresh import DTYPES
from surgery.core.arithmetic import divided
from surgery.core.codec import Settings, Shape
from surgery.errors import ConfigError, printable

BITS = (4, 8)
GROUP = 128
WORD = 32  # bits of what codes are packed into


class Scales(NamedTuple):
    """Of groups, and their zero points, [out, groups]."""

    scales: Tensor  # in the dtype of the weight
    zeros: Tensor  # int16


class Groups(NamedTuple):
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


def unpacked(words: Tensor, bits: int) -> Tensor:
    """The codes of rows of words, int16, those that fill the last word too."""
    octets = words.flatten().view(torch.uint8).view(len(words), -1)  # [out, bytes]
    codes = octets if bits == 8 else torch.stack([octets & 15, octets >> 4], dim=2).flatten(1)
    return codes.to(torch.int16) - (1 << bits - 1)


def packed_words(codes: Tensor, bits: int) -> Tensor:
    """Rows of whole words."""
    octets = (codes + (1 << bits - 1)).to(torch.uint8)
    joined = octets if bits == 8 else octets[:, ::2] | octets[:, 1::2] << 4
    return joined.flatten().view(torch.int32).view(len(codes), -1)


def padded(codes: Tensor, bits: int) -> Tensor:
    """To whole words, by bits of zero."""
    return torch.nn.functional.pad(codes, (0, -codes.shape[1] % (WORD // bits)), value=-(1 << bits - 1))


def _ends(bits: int) -> tuple[int, int]:
    return -(1 << bits - 1), (1 << bits - 1) - 1


def fresh_scales(tiles: Iterable[Tensor], shape: Shape, dtype: torch.dtype, settings: Settings) -> Scales:
    """By the least and the largest of each group. ConfigError for what compressed-tensors makes of no weight."""
    bits, group = settings.get("num_bits", 4), settings.get("group_size", GROUP)
    width = shape[1] if group == -1 and len(shape) == 2 else group
    if len(shape) != 2 or bits not in BITS or not _divides(width, shape[1]) or dtype_name(dtype) not in DTYPES:
        raise ConfigError(
            f"{list(shape)} in {dtype_name(dtype)}, in {printable(bits)} bits by groups of {printable(group)} inputs; "
            f"a matrix of whole groups in {', '.join(DTYPES)}, in 4 or 8 bits, is wanted"
        )
    symmetric = bool(settings.get("symmetric", True))
    parts = [_scales(tile.reshape(len(tile), -1, width), bits, symmetric) for tile in tiles]
    return Scales(*(torch.cat(one) for one in zip(*parts, strict=True)))


def fresh_codes(weight: Tensor, by: Scales, bits: int) -> Tensor:
    """[out, in], int16, as compressed-tensors computes them: in the weight's dtype."""
    grouped = weight.reshape(len(weight), by.scales.shape[1], -1)
    codes = (grouped / by.scales.unsqueeze(2) + by.zeros.unsqueeze(2).to(weight.dtype)).clamp(*_ends(bits)).round()
    return codes.view(weight.shape).to(torch.int16)


def _scales(grouped: Tensor, bits: int, symmetric: bool) -> Scales:
    """In the weight's dtype, as compressed-tensors computes them."""
    low, high = grouped.amin(dim=2).clamp(max=0), grouped.amax(dim=2).clamp(min=0)
    least, range_ = -(1 << bits - 1), (1 << bits) - 1
    scales = divided(torch.maximum(-low, high), range_ / 2) if symmetric else divided(high - low, range_)
    zeros = torch.zeros_like(scales) if symmetric else (least - low / scales).clamp(*_ends(bits))
    scales = torch.where(scales == 0, torch.finfo(scales.dtype).eps, scales)
    return Scales(scales, zeros.round().nan_to_num(0.0).to(torch.int16))


def _divides(width: Any, columns: int) -> bool:
    return type(width) is int and width > 0 and columns % width == 0


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
