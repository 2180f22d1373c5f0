"""fp4 in blocks: floats of 4 bits along the inputs, each block with a scale, as compressed-tensors packs them.

w = value[code] * scale, in float32.
"""

from abc import abstractmethod
from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor

from surgery.codecs.fp4 import E2M1, codes_of, joined, looked_up, nearest, neighbours
from surgery.core.codec import Headers, Packed, Settings, Shape, TiledCodec, differs


class Fp4Blocks(TiledCodec):
    """Codes [out, in / 2], and scales of blocks, however each format holds them."""

    block: ClassVar[int]  # inputs

    @abstractmethod
    def by(self, packed: Packed) -> Tensor:
        """The scales, [out, blocks, 1], in float32."""

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
        return self._scaled(looked_up(octets, torch.tensor(E2M1, device=octets.device)), packed).to(dtype)

    def encode(self, weight: Tensor, like: Packed) -> Packed:
        changed, scales = differs(weight, self.decode(like, weight.dtype)), self.by(like)
        wanted = nearest((self.blocks(weight).to(torch.float64) / scales).nan_to_num(0.0)).view(weight.shape)
        held = changed & (scales != 0).expand(-1, -1, self.block).reshape(weight.shape)
        codes = torch.where(held, wanted, codes_of(like.tensors["weight_packed"]))
        return like._replace(tensors={**like.tensors, "weight_packed": joined(codes)})

    def coded(self, weight: Tensor, by: Packed) -> Packed:
        quotients = (self.blocks(weight) / self.by(by)).to(torch.float64) + 0.0  # a zero is held without a sign
        codes = nearest(quotients).view(weight.shape)
        return by._replace(tensors={**by.tensors, "weight_packed": joined(codes)})

    def grid(self, packed: Packed) -> tuple[Tensor, Tensor]:
        steps = (neighbours(packed.tensors["weight_packed"], step) for step in (-1, 1))
        pair = [self._scaled(one, packed).to(torch.float64) for one in steps]
        return torch.minimum(*pair), torch.maximum(*pair)  # a scale may be below zero

    def blocks(self, values: Tensor) -> Tensor:
        """[out, in] -> [out, blocks, inputs of a block]."""
        return values.reshape(len(values), -1, self.block)

    def _scaled(self, values: Tensor, packed: Packed) -> Tensor:
        return self.blocks(values).mul(self.by(packed)).view(values.shape)
