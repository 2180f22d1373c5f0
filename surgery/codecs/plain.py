"""Plain: the weight itself, in float64, float32, bfloat16 or float16."""

from collections.abc import Mapping

import torch
from torch import Tensor

from surgery.core.arithmetic import round_once
from surgery.core.codec import Codec, Packed

PLAIN_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


class Plain(Codec):
    """One tensor in the role `weight`."""

    name = "plain"

    def claims(self, headers: Mapping[str, tuple[torch.dtype, tuple[int, ...]]]) -> bool:
        return "weight" in headers and headers["weight"][0] in PLAIN_DTYPES

    def decode(self, packed: Packed, dtype: torch.dtype) -> Tensor:
        return packed.tensors["weight"].to(dtype, copy=True)

    def encode(self, weight: Tensor, like: Packed) -> Packed:
        dtype = like.tensors["weight"].dtype
        held = round_once(weight, dtype) if weight.dtype == torch.float64 else weight.to(dtype)
        return Packed({**like.tensors, "weight": held}, like.settings)
