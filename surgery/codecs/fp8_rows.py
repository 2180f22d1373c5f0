"""fp8 by rows, as compressed-tensors makes it of a weight (FP8_DYNAMIC): the scales are in the weight's own dtype.

https://github.com/vllm-project/compressed-tensors
"""

from collections.abc import Iterable, Sequence
from typing import ClassVar

import torch
from torch import Tensor

from surgery.codecs.bnb4_fresh import DTYPES
from surgery.codecs.compressed_config import tokens_of, told_of
from surgery.codecs.fp8_block import FLOATS, Fp8
from surgery.core.arithmetic import divided
from surgery.core.codec import Packed, Settings, Shape, on_meta
from surgery.errors import ConfigError

_FORM, _SCALE = "float-quantized", "weight_scale"
_LARGEST = torch.finfo(FLOATS[0]).max


class Fp8Rows(Fp8):
    """Codes [out, in], and scales [out, 1]."""

    scaled_by: ClassVar[tuple[str, ...]] = (_SCALE,)

    def scales(self, tiles: Iterable[Tensor], shape: Shape, dtype: torch.dtype, settings: Settings) -> Packed:  # noqa: ARG002  # it has none
        """By the largest of each row."""
        if len(shape) != 2 or dtype not in DTYPES.values():
            raise ConfigError(
                f"fp8 by rows: {list(shape)} in {str(dtype).removeprefix('torch.')}; a matrix in {', '.join(DTYPES)} "
                "is wanted"
            )
        scales = divided(torch.cat([tile.abs().amax(dim=1, keepdim=True) for tile in tiles]), _LARGEST)
        scales = torch.where(scales == 0, torch.finfo(dtype).eps, scales)
        return Packed({"weight": on_meta(shape, FLOATS[0]), _SCALE: scales}, {"weight_block_size": (1, shape[1])})

    def coded(self, weight: Tensor, by: Packed) -> Packed:
        held = (weight / by.tensors[_SCALE]).clamp_(-_LARGEST, _LARGEST)
        return by._replace(tensors={**by.tensors, "weight": held.to(FLOATS[0])})

    def told(self, settings: Settings, dtype: torch.dtype, plainly: Sequence[str]) -> Settings | None:  # noqa: ARG002
        weights = {"num_bits": 8, "type": "float", "strategy": "channel", "symmetric": True}
        return told_of(_FORM, weights, plainly, tokens_of("float"))
