"""nvfp4: floats of 4 bits in blocks of 16 along the inputs, each with a scale of 8 bits, and one for all.

w = value[code] * (scale / global scale), in float32: compressed-tensors stores the reciprocal of the scale for all.
https://github.com/vllm-project/compressed-tensors
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import ClassVar

import torch
from torch import Tensor

from surgery.codecs.compressed_config import told_of
from surgery.codecs.fp4 import SIZES
from surgery.codecs.fp4_blocks import Fp4Blocks
from surgery.core.arithmetic import divided
from surgery.core.codec import Headers, Packed, Settings, Shape, on_meta
from surgery.errors import ConfigError, FormatError

BLOCK = 16
_FLOAT = torch.float8_e4m3fn
_LEAST = 0.125  # what compressed-tensors makes of a scale of zero


class Nvfp4(Fp4Blocks):
    """Codes [out, in / 2], scales [out, in / 16], the global scale [1]; what activations are scaled by."""

    name = "nvfp4-pack-quantized"
    block = BLOCK
    endings: ClassVar[Mapping[str, str]] = {
        role: f".{role}" for role in ("weight_packed", "weight_scale", "weight_global_scale", "input_global_scale")
    }

    def claims(self, headers: Headers) -> bool:
        return headers.get("weight_packed", (None,))[0] == torch.uint8 and "weight_global_scale" in headers

    def read(self, headers: Headers, config: Settings, load: Callable[[str], Tensor]) -> Settings:  # noqa: ARG002
        shape, scales = headers["weight_packed"][1], headers.get("weight_scale", (None, ()))
        blocks = (*shape[:1], shape[-1] * 2 // BLOCK) if len(shape) == 2 and shape[1] * 2 % BLOCK == 0 else None
        if not all(shape) or scales != (_FLOAT, blocks) or headers["weight_global_scale"] != (torch.float32, (1,)):
            raise FormatError(
                f"nvfp4 codes {list(shape)} with scales {list(scales[1])}; a matrix with a scale in float8_e4m3fn for "
                f"each {BLOCK} inputs, and one for all in float32, is wanted; this layout is not supported"
            )
        return {}

    def by(self, packed: Packed) -> Tensor:
        held = packed.tensors
        return (held["weight_scale"].to(torch.float32) / held["weight_global_scale"]).unsqueeze(2)

    def scales(self, tiles: Iterable[Tensor], shape: Shape, dtype: torch.dtype, settings: Settings) -> Packed:  # noqa: ARG002  # it has none
        """[out, in]. The scales are those of compressed-tensors, by the largest of each block and of all."""
        if len(shape) != 2 or shape[1] % BLOCK:
            raise ConfigError(f"nvfp4: {list(shape)}; a matrix with inputs in {BLOCK}s is wanted")
        tops, largest = torch.cat([self.blocks(tile).abs().amax(dim=2) for tile in tiles]), torch.finfo(_FLOAT).max
        whole = (largest * SIZES[-1] / tops.max().clamp(min=torch.finfo(dtype).tiny)).to(torch.float32).view(1)
        scales = (whole * divided(tops, SIZES[-1])).clamp(max=largest).to(_FLOAT)
        scales = torch.where(scales.to(torch.float32) == 0, _LEAST, scales.to(torch.float32)).to(_FLOAT)
        codes = on_meta((shape[0], shape[1] // 2), torch.uint8)
        return Packed({"weight_packed": codes, "weight_scale": scales, "weight_global_scale": whole})

    def told(self, settings: Settings, dtype: torch.dtype, plainly: Sequence[str]) -> Settings | None:  # noqa: ARG002
        weights = {"num_bits": 4, "type": "float", "strategy": "tensor_group", "symmetric": True, "group_size": BLOCK}
        return told_of(self.name, weights, plainly)
