"""mxfp4 of linear layers, as compressed-tensors packs it (MXFP4A16): blocks of 32, each with a power of two.

w = value[code] * 2^(scale - 127). What gpt-oss has of experts is in mxfp4.py.
https://github.com/vllm-project/compressed-tensors
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import ClassVar

import torch
from torch import Tensor

from surgery.codecs.compressed_config import told_of
from surgery.codecs.fp4_blocks import Fp4Blocks
from surgery.core.arithmetic import power_of_two
from surgery.core.codec import Headers, Packed, Settings, Shape, on_meta
from surgery.errors import ConfigError, FormatError

BLOCK = 32
_BIAS = 127
_ROOM = 2  # the exponent of the largest float of 4 bits, 6
_BITS = {torch.float32: (torch.int32, 23), torch.bfloat16: (torch.int16, 7), torch.float16: (torch.int16, 10)}


class Mxfp4Packed(Fp4Blocks):
    """Codes [out, in / 2], and scales [out, in / 32] in bytes."""

    name = "mxfp4-pack-quantized"
    block = BLOCK
    endings: ClassVar[Mapping[str, str]] = {role: f".{role}" for role in ("weight_packed", "weight_scale")}

    def claims(self, headers: Headers) -> bool:
        codes, scales = (headers.get(role, (None,))[0] for role in self.endings)
        return codes == scales == torch.uint8 and "weight_global_scale" not in headers

    def read(self, headers: Headers, config: Settings, load: Callable[[str], Tensor]) -> Settings:  # noqa: ARG002
        (_, shape), (_, scales) = headers["weight_packed"], headers["weight_scale"]
        if len(shape) != 2 or not all(shape) or shape[1] * 2 % BLOCK or scales != (shape[0], shape[1] * 2 // BLOCK):
            raise FormatError(
                f"mxfp4 codes {list(shape)} with scales {list(scales)}; a matrix with a scale for each {BLOCK} inputs "
                "is wanted; this layout is not supported"
            )
        return {}

    def by(self, packed: Packed) -> Tensor:
        return power_of_two(packed.tensors["weight_scale"].to(torch.int64) - _BIAS).to(torch.float32).unsqueeze(2)

    def scales(self, tiles: Iterable[Tensor], shape: Shape, dtype: torch.dtype, settings: Settings) -> Packed:  # noqa: ARG002  # it has none
        """[out, in]. The scales are those of compressed-tensors, by the largest of each block."""
        if len(shape) != 2 or shape[1] % BLOCK or dtype not in _BITS:
            raise ConfigError(
                f"mxfp4: {list(shape)} in {str(dtype).removeprefix('torch.')}; a matrix with inputs in {BLOCK}s, in "
                "float32, bfloat16 or float16, is wanted"
            )
        power = _powers(torch.cat([self.blocks(tile).abs().amax(dim=2) for tile in tiles]))
        lost = power_of_two(power).to(dtype) == 0  # in float16, where a scale of zero becomes one
        scales = torch.where(lost, _BIAS, power + _BIAS).to(torch.uint8)
        return Packed({"weight_packed": on_meta((shape[0], shape[1] // 2), torch.uint8), "weight_scale": scales})

    def told(self, settings: Settings, dtype: torch.dtype, plainly: Sequence[str]) -> Settings | None:  # noqa: ARG002
        weights = {"num_bits": 4, "type": "float", "strategy": "group", "symmetric": True, "group_size": BLOCK}
        return told_of(self.name, weights | dict.fromkeys(("scale_dtype", "zp_dtype"), "torch.uint8"), plainly)


def _powers(tops: Tensor) -> Tensor:
    """The exponent of each scale: of the power of two below, or above from 1.75 of it on, as the bits are told."""
    bits, mantissa = _BITS[tops.dtype]
    fields = (tops.view(bits).to(torch.int64) + (1 << mantissa - 2)) >> mantissa
    bias = (1 << tops.element_size() * 8 - mantissa - 2) - 1
    return torch.where(fields == 0, -_BIAS, fields - bias - _ROOM).clamp(-_BIAS, _BIAS)
