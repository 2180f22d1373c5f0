"""Plain: the weight itself, in float64, float32, bfloat16 or float16."""

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor

from surgery.core.codec import Codec, Headers, Packed, Settings, Shape
from surgery.core.rounding import round_once

PLAIN_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


class Plain(Codec):
    """One tensor in the role `weight`."""

    name = "plain"
    endings: ClassVar[Mapping[str, str]] = {"weight": ".weight"}

    def claims(self, headers: Headers) -> bool:
        return "weight" in headers and headers["weight"][0] in PLAIN_DTYPES

    def shape(self, headers: Headers, settings: Settings) -> Shape:  # noqa: ARG002  # it has none
        return headers["weight"][1]

    def spans(self, headers: Headers, settings: Settings, rows: slice) -> Mapping[str, slice]:  # noqa: ARG002
        return {"weight": rows}

    def decode(self, packed: Packed, dtype: torch.dtype) -> Tensor:
        return packed.tensors["weight"].to(dtype, copy=True)

    def encode(self, weight: Tensor, like: Packed) -> Packed:
        dtype = like.tensors["weight"].dtype
        held = round_once(weight, dtype) if weight.dtype == torch.float64 else weight.to(dtype)
        return like._replace(tensors={**like.tensors, "weight": held})

    def fresh(self, weight: Tensor, settings: Settings) -> Packed:  # noqa: ARG002  # it has none
        return Packed({"weight": weight.clone()})

    def grid(self, packed: Packed) -> tuple[Tensor, Tensor]:
        weight = packed.tensors["weight"]
        ends = torch.tensor([-torch.inf, torch.inf], dtype=weight.dtype, device=weight.device)
        below, above = (torch.nextafter(weight, end).to(torch.float64) for end in ends)
        return below, above
