"""mxfp4: floats of 4 bits in blocks of 32 along the inputs, each with a power of two for its scale (gpt-oss).

w = value[code] * 2^(scale - 127); of two codes in a byte the first is the low half. The codes are [expert, out, in],
the weight is [expert, in, out], as transformers' experts hold it.
https://www.opencompute.org/documents/ocp-microscaling-formats-mx-v1-0-spec-final-pdf
"""

from collections.abc import Callable, Mapping
from typing import ClassVar

import torch
from torch import Tensor

from surgery.core.codec import Codec, Headers, Packed, Settings, Shape, differs
from surgery.errors import ConfigError, FormatError

BLOCK = 32
# Twice the values, for half the scale: so that 2^128, the largest scale, is a float32 too.
_VALUES = tuple(sign * value for sign in (1.0, -1.0) for value in (0.0, 1.0, 2.0, 3.0, 4.0, 6.0, 8.0, 12.0))
_BIAS, _NO_NUMBER = 128, 255  # the byte 255 is a number all the same to transformers


class Mxfp4(Codec):
    """blocks [expert, out, in / 32, 16] and scales [expert, out, in / 32], both bytes."""

    name = "mxfp4"
    endings: ClassVar[Mapping[str, str]] = {"blocks": "_blocks", "scales": "_scales"}
    plain_ending = ""

    def claims(self, headers: Headers) -> bool:
        return {dtype for dtype, _ in headers.values()} == {torch.uint8} and {"blocks", "scales"} <= headers.keys()

    def read(self, headers: Headers, config: Settings, load: Callable[[str], Tensor]) -> Settings:  # noqa: ARG002
        blocks, scales = headers["blocks"][1], headers["scales"][1]
        if len(blocks) != 4 or blocks != (*scales, BLOCK // 2):
            raise FormatError(
                f"mxfp4 blocks {list(blocks)} with scales {list(scales)}; [expert, out, block, {BLOCK // 2}] with one "
                "scale for each block is wanted; this layout is not supported"
            )
        return {}

    def shape(self, headers: Headers, settings: Settings) -> Shape:  # noqa: ARG002  # it has none
        experts, out, groups, half = headers["blocks"][1]
        return experts, groups * half * 2, out

    def spans(self, headers: Headers, settings: Settings, rows: slice) -> Mapping[str, slice]:  # noqa: ARG002
        return {"blocks": rows, "scales": rows}

    def decode(self, packed: Packed, dtype: torch.dtype) -> Tensor:
        table = torch.tensor(_VALUES, device=packed.tensors["blocks"].device)
        scaled = _looked_up(packed, table).mul_(_scales(packed)).to(dtype)  # [expert, out, block, 32]
        return _as_weight(scaled)

    def encode(self, weight: Tensor, like: Packed) -> Packed:
        scales, codes = _scales(like), _codes(like)
        changed = _as_blocks(differs(weight, self.decode(like, weight.dtype)))
        codes = torch.where(changed, _nearest(_as_blocks(weight).to(torch.float64) / scales), codes)
        return like._replace(tensors={**like.tensors, "blocks": _joined(codes)})

    def fresh(self, weight: Tensor, settings: Settings) -> Packed:  # noqa: ARG002  # it has none
        """[expert, in, out]; each scale is the least power of two by which no value is cut."""
        if weight.dim() != 3 or weight.shape[1] % BLOCK:
            raise ConfigError(f"mxfp4: {list(weight.shape)}; [expert, in, out] with inputs in {BLOCK}s is wanted")
        blocks = _as_blocks(weight.to(torch.float64))
        mantissa, exponent = torch.frexp(blocks.abs().amax(dim=3) / max(_VALUES))
        power = torch.where(mantissa == 0.5, exponent - 1, exponent)
        scales = (power + _BIAS).clamp(0, _NO_NUMBER - 1).to(torch.uint8)
        codes = _nearest(blocks / _powers(scales))
        return Packed({"blocks": _joined(codes), "scales": scales})

    def grid(self, packed: Packed) -> tuple[Tensor, Tensor]:
        values = torch.tensor(sorted({*_VALUES}), device=packed.tensors["blocks"].device)  # with one zero
        rank = torch.searchsorted(values, _looked_up(packed, torch.tensor(_VALUES, device=values.device)))
        steps = (values[(rank + step).clamp(0, len(values) - 1)] * _scales(packed) for step in (-1, 1))
        below, above = (_as_weight(one.to(torch.float64)) for one in steps)
        return below, above


def _codes(packed: Packed) -> Tensor:
    """[expert, out, block, 32], bytes."""
    octets = packed.tensors["blocks"]
    return torch.stack([octets & 15, octets >> 4], dim=4).flatten(3)


def _looked_up(packed: Packed, table: Tensor) -> Tensor:
    """[expert, out, block, 32], a float32 of `table` [16] for each code; two at a time."""
    octets = packed.tensors["blocks"].contiguous()
    low, high = (torch.arange(256, device=table.device) >> shift & 15 for shift in (0, 4))
    pairs = torch.stack([table[low], table[high]], dim=1).view(torch.int64).flatten()  # [256]
    found = pairs.index_select(0, octets.flatten().to(torch.int32)).view(torch.float32)
    return found.view(*octets.shape[:3], BLOCK)


def _joined(codes: Tensor) -> Tensor:
    return codes[..., ::2] | (codes[..., 1::2] << 4)


def _scales(packed: Packed) -> Tensor:
    return _powers(packed.tensors["scales"])


def _powers(scales: Tensor) -> Tensor:
    """[expert, out, block, 1], float32."""
    return torch.exp2(scales.to(torch.float32) - _BIAS).unsqueeze(3)


def _nearest(values: Tensor) -> Tensor:
    """Codes of the nearest values; midway, of the smaller magnitude's where its code is even, as floats round."""
    sizes = torch.tensor(_VALUES[:8], dtype=torch.float64, device=values.device)
    middles = (sizes[1:] + sizes[:-1]) / 2
    below, above = torch.bucketize(values.abs(), middles), torch.bucketize(values.abs(), middles, right=True)
    code = torch.where(below % 2 == 0, below, above)
    return (code + 8 * torch.signbit(values)).to(torch.uint8)


def _as_blocks(weight: Tensor) -> Tensor:
    """[expert, in, out] -> [expert, out, block, 32]."""
    experts, columns, out = weight.shape
    return weight.transpose(1, 2).contiguous().view(experts, out, columns // BLOCK, BLOCK)


def _as_weight(blocks: Tensor) -> Tensor:
    """The inverse of `_as_blocks`, in memory of its own."""
    return blocks.flatten(2).transpose(1, 2).contiguous()
