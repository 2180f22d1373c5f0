"""mxfp4: floats of 4 bits in blocks of 32 along the inputs, each with a power of two for its scale (gpt-oss).

w = value[code] * 2^(scale - 127); of two codes in a byte the first is the low half. The codes are [expert, out, in],
the weight is [expert, in, out], as transformers' experts hold it.
https://www.opencompute.org/documents/ocp-microscaling-formats-mx-v1-0-spec-final-pdf
"""

from collections.abc import Callable, Iterable, Mapping
from typing import ClassVar

import torch
from torch import Tensor

from surgery.codecs.fp4 import E2M1, SIZES, codes_of, joined, looked_up, nearest, neighbours
from surgery.core.arithmetic import divided, power_of_two
from surgery.core.codec import Headers, Packed, Settings, Shape, TiledCodec, differs, on_meta
from surgery.errors import ConfigError, FormatError

BLOCK = 32
# Values are doubled and scales halved: so that 2^128, the largest scale, is a float32 too.
_BIAS, _NO_NUMBER = 128, 255  # the byte 255 is a number all the same to transformers


class Mxfp4(TiledCodec):
    """blocks [expert, out, in / 32, 16] and scales [expert, out, in / 32], both bytes.

    Without the axis of experts, such as rows of all of them one below another, the weight is [out, in].
    """

    name = "mxfp4"
    endings: ClassVar[Mapping[str, str]] = {"blocks": "_blocks", "scales": "_scales"}
    plain_ending = ""
    stacked = True

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
        *stack, out, groups, half = headers["blocks"][1]
        return (*stack, groups * half * 2, out) if stack else (out, groups * half * 2)

    def spans(self, headers: Headers, settings: Settings, rows: slice) -> Mapping[str, slice]:  # noqa: ARG002
        return {"blocks": rows, "scales": rows}

    def decode(self, packed: Packed, dtype: torch.dtype) -> Tensor:
        blocks = packed.tensors["blocks"]
        doubled = torch.tensor(E2M1, device=blocks.device) * 2
        scaled = looked_up(blocks, doubled).mul_(_scales(packed)).to(dtype)  # [..., out, block, 32]
        return _as_weight(scaled)

    def encode(self, weight: Tensor, like: Packed) -> Packed:
        changed = _as_blocks(differs(weight, self.decode(like, weight.dtype)))
        wanted = nearest(_as_blocks(weight).to(torch.float64) / _scales(like) / 2)
        codes = torch.where(changed, wanted, codes_of(like.tensors["blocks"]))
        return like._replace(tensors={**like.tensors, "blocks": joined(codes)})

    def scales(self, tiles: Iterable[Tensor], shape: Shape, dtype: torch.dtype, settings: Settings) -> Packed:  # noqa: ARG002  # it has none
        """[expert, in, out]; each scale is the least power of two by which no value is cut."""
        if len(shape) != 3 or shape[1] % BLOCK:
            raise ConfigError(f"mxfp4: {list(shape)}; [expert, in, out] with inputs in {BLOCK}s is wanted")
        tops = torch.cat([_as_blocks(tile).abs().amax(dim=3) for tile in tiles]).to(torch.float64)
        mantissa, exponent = torch.frexp(divided(tops, 2 * SIZES[-1]))
        power = torch.where(mantissa == 0.5, exponent - 1, exponent)
        scales = (power + _BIAS).clamp(0, _NO_NUMBER - 1).to(torch.uint8)
        return Packed({"blocks": on_meta((*scales.shape, BLOCK // 2), torch.uint8), "scales": scales})

    def coded(self, weight: Tensor, by: Packed) -> Packed:
        codes = nearest(_as_blocks(weight).to(torch.float64) / _scales(by) / 2)
        return by._replace(tensors={**by.tensors, "blocks": joined(codes)})

    def grid(self, packed: Packed) -> tuple[Tensor, Tensor]:
        steps = (neighbours(packed.tensors["blocks"], step) * 2 * _scales(packed) for step in (-1, 1))
        below, above = (_as_weight(one.to(torch.float64)) for one in steps)
        return below, above


def _scales(packed: Packed) -> Tensor:
    return _powers(packed.tensors["scales"])


def _powers(scales: Tensor) -> Tensor:
    """[..., block, 1], float32."""
    return power_of_two(scales.to(torch.int64) - _BIAS).to(torch.float32).unsqueeze(-1)


def _as_blocks(weight: Tensor) -> Tensor:
    """[expert, in, out] -> [expert, out, block, 32]; [out, in] -> [out, block, 32]."""
    rows = weight.transpose(1, 2).contiguous() if weight.dim() == 3 else weight
    return rows.reshape(*rows.shape[:-1], rows.shape[-1] // BLOCK, BLOCK)


def _as_weight(blocks: Tensor) -> Tensor:
    """The inverse of `_as_blocks`, in memory of its own."""
    rows = blocks.flatten(-2)
    return rows.transpose(1, 2).contiguous() if rows.dim() == 3 else rows
