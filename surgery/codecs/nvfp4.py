"""nvfp4: floats of 4 bits in blocks of 16 along the inputs, each with a scale of 8 bits, and one for all.

w = value[code] * (scale / global scale), in float32: compressed-tensors stores the reciprocal of the scale for all.
https://github.com/vllm-project/compressed-tensors
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import ClassVar

import torch
from torch import Tensor

from surgery.codecs.compressed_config import told_of
from surgery.codecs.fp4 import E2M1, SIZES, codes_of, joined, looked_up, nearest, neighbours
from surgery.core.arithmetic import divided
from surgery.core.codec import Headers, Packed, Settings, Shape, TiledCodec, differs, on_meta
from surgery.errors import ConfigError, FormatError

BLOCK = 16
_FLOAT = torch.float8_e4m3fn
_LEAST = 0.125  # what compressed-tensors makes of a scale of zero


class Nvfp4(TiledCodec):
    """Codes [out, in / 2], scales [out, in / 16], the global scale [1]; what activations are scaled by."""

    name = "nvfp4-pack-quantized"
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

    def shape(self, headers: Headers, settings: Settings) -> Shape:  # noqa: ARG002  # it has none
        out, half = headers["weight_packed"][1]
        return out, half * 2

    def dtype(self, settings: Settings) -> torch.dtype | None:  # noqa: ARG002  # it has none
        """What compressed-tensors decodes to, whatever the model."""
        return torch.bfloat16

    def spans(self, headers: Headers, settings: Settings, rows: slice) -> Mapping[str, slice]:  # noqa: ARG002
        return {"weight_packed": rows, "weight_scale": rows}

    def decode(self, packed: Packed, dtype: torch.dtype) -> Tensor:
        octets = packed.tensors["weight_packed"]
        return _scaled(looked_up(octets, torch.tensor(E2M1, device=octets.device)), packed).to(dtype)

    def encode(self, weight: Tensor, like: Packed) -> Packed:
        changed, scales = differs(weight, self.decode(like, weight.dtype)), _scales(like)
        wanted = nearest((_blocks(weight).to(torch.float64) / scales).nan_to_num(0.0)).view(weight.shape)
        held = changed & (scales != 0).expand(-1, -1, BLOCK).reshape(weight.shape)
        codes = torch.where(held, wanted, codes_of(like.tensors["weight_packed"]))
        return like._replace(tensors={**like.tensors, "weight_packed": joined(codes)})

    def scales(self, tiles: Iterable[Tensor], shape: Shape, dtype: torch.dtype, settings: Settings) -> Packed:  # noqa: ARG002  # it has none
        """[out, in]. The scales are those of compressed-tensors, by the largest of each block and of all."""
        if len(shape) != 2 or shape[1] % BLOCK:
            raise ConfigError(f"nvfp4: {list(shape)}; a matrix with inputs in {BLOCK}s is wanted")
        tops, largest = torch.cat([_blocks(tile).abs().amax(dim=2) for tile in tiles]), torch.finfo(_FLOAT).max
        whole = (largest * SIZES[-1] / tops.max().clamp(min=torch.finfo(dtype).tiny)).to(torch.float32).view(1)
        scales = (whole * divided(tops, SIZES[-1])).clamp(max=largest).to(_FLOAT)
        scales = torch.where(scales.to(torch.float32) == 0, _LEAST, scales.to(torch.float32)).to(_FLOAT)
        codes = on_meta((shape[0], shape[1] // 2), torch.uint8)
        return Packed({"weight_packed": codes, "weight_scale": scales, "weight_global_scale": whole})

    def coded(self, weight: Tensor, by: Packed) -> Packed:
        codes = nearest((_blocks(weight) / _scales(by)).to(torch.float64)).view(weight.shape)
        return by._replace(tensors={**by.tensors, "weight_packed": joined(codes)})

    def told(self, settings: Settings, dtype: torch.dtype, plainly: Sequence[str]) -> Settings | None:  # noqa: ARG002
        weights = {"num_bits": 4, "type": "float", "strategy": "tensor_group", "symmetric": True, "group_size": BLOCK}
        return told_of(self.name, weights, plainly)

    def grid(self, packed: Packed) -> tuple[Tensor, Tensor]:
        steps = (neighbours(packed.tensors["weight_packed"], step) for step in (-1, 1))
        pair = [_scaled(one, packed).to(torch.float64) for one in steps]
        return torch.minimum(*pair), torch.maximum(*pair)  # a scale may be below zero


def _blocks(values: Tensor) -> Tensor:
    """[out, in] -> [out, blocks, 16]."""
    return values.reshape(len(values), -1, BLOCK)


def _scales(packed: Packed) -> Tensor:
    """[out, blocks, 1], float32."""
    return (packed.tensors["weight_scale"].to(torch.float32) / packed.tensors["weight_global_scale"]).unsqueeze(2)


def _scaled(values: Tensor, packed: Packed) -> Tensor:
    return _blocks(values).mul(_scales(packed)).view(values.shape)
