"""bnb 8-bit: the int8 of bitsandbytes, a whole number times the scale of its row.

w = code * SCB * (1/127) in float32, in this order; the last factor is a constant of float32, and a division by 127
gives other bits. https://arxiv.org/abs/2208.07339
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import ClassVar

import torch
from torch import Tensor

from surgery.codecs.bitsandbytes_config import told
from surgery.core.codec import Headers, Packed, Settings, Shape, TiledCodec, differs, on_meta
from surgery.errors import FormatError, ValueRangeError

RECIPROCAL = 7.874015718698502e-3  # what bitsandbytes multiplies by
LARGEST = 127  # it never writes -128
_ROWS = 256  # that are encoded at a time: bounds the memory


class Bnb8(TiledCodec):
    """int8 codes [out, in] and a scale for each row, SCB [out]."""

    name = "bnb8"
    made_in = torch.float16
    endings: ClassVar[Mapping[str, str]] = {"weight": ".weight", "SCB": ".SCB", "weight_format": ".weight_format"}

    def claims(self, headers: Headers) -> bool:
        return headers.get("weight", (None,))[0] == torch.int8 and not {"SCB", "weight_format"}.isdisjoint(headers)

    def read(self, headers: Headers, config: Settings, load: Callable[[str], Tensor]) -> Settings:  # noqa: ARG002
        if "SCB" not in headers:
            raise FormatError(
                "SCB, the scales of its rows, is missing, without which 8-bit codes mean nothing; save it again"
            )
        (_, shape), (dtype, rows) = headers["weight"], headers["SCB"]
        if len(shape) != 2 or rows != shape[:1] or dtype != torch.float32:
            what = str(dtype).removeprefix("torch.")
            raise FormatError(
                f"8-bit codes {list(shape)} with scales {list(rows)} in {what}; one for each row, in float32, is "
                "wanted; quantize the model anew"
            )
        if math.prod(headers.get("weight_format", (None, (1,)))[1]) != 1:
            raise FormatError("8-bit codes with several layouts; one is wanted; quantize the model anew")
        layout = int(load("weight_format").flatten()[0]) if "weight_format" in headers else 0
        if layout != 0:
            raise FormatError(f"8-bit codes in the layout {layout} of old GPUs; rows (0) are wanted; quantize it anew")
        return {}

    def shape(self, headers: Headers, settings: Settings) -> Shape:  # noqa: ARG002  # it has none
        return headers["weight"][1]

    def spans(self, headers: Headers, settings: Settings, rows: slice) -> Mapping[str, slice]:  # noqa: ARG002
        return {"weight": rows, "SCB": rows}

    def decode(self, packed: Packed, dtype: torch.dtype) -> Tensor:
        return _values(packed.tensors["weight"], packed.tensors["SCB"]).to(dtype)

    def encode(self, weight: Tensor, like: Packed) -> Packed:
        codes, SCB = like.tensors["weight"], like.tensors["SCB"]
        wanted = _nearest(weight.to(torch.float64), SCB.to(torch.float64) * RECIPROCAL)
        changed = differs(weight, self.decode(like, weight.dtype)) & (SCB != 0).unsqueeze(1)
        return like._replace(tensors={**like.tensors, "weight": torch.where(changed, wanted, codes)})

    def scales(
        self,
        tiles: Iterable[Tensor],
        shape: Shape,
        dtype: torch.dtype,  # noqa: ARG002  # of float16, whatever it was
        settings: Settings,  # noqa: ARG002  # it has none
    ) -> Packed:
        """Those of bitsandbytes on a CPU, which takes the weight [out, in] in float16.

        ValueRangeError where it does not fit into that.
        """
        SCB = torch.cat([tile.to(torch.float16).abs().amax(dim=1).to(torch.float32) for tile in tiles])
        if not bool(SCB.isfinite().all()):
            raise ValueRangeError(
                "8-bit: a weight is beyond the range of float16, which is wanted; choose another format"
            )
        rows = torch.zeros((), dtype=torch.uint8, device=SCB.device)
        return Packed({"weight": on_meta(shape, torch.int8), "SCB": SCB, "weight_format": rows})

    def coded(self, weight: Tensor, by: Packed) -> Packed:
        scales = torch.split(LARGEST / by.tensors["SCB"].unsqueeze(1), _ROWS)
        parts = zip(torch.split(weight.to(torch.float16), _ROWS), scales, strict=True)
        codes = torch.cat([torch.round(part * scale).nan_to_num(0.0).to(torch.int8) for part, scale in parts])
        return by._replace(tensors={**by.tensors, "weight": codes})

    def told(self, settings: Settings, dtype: torch.dtype, plainly: Sequence[str]) -> Settings | None:  # noqa: ARG002
        return told("int8", dtype, plainly)

    def grid(self, packed: Packed) -> tuple[Tensor, Tensor]:
        codes, SCB = packed.tensors["weight"].to(torch.int16), packed.tensors["SCB"]
        below, above = ((codes + step).clamp(-LARGEST, LARGEST) for step in (-1, 1))
        return _values(below, SCB).to(torch.float64), _values(above, SCB).to(torch.float64)


def _values(codes: Tensor, SCB: Tensor) -> Tensor:
    """In float32."""
    return codes * SCB.unsqueeze(1) * RECIPROCAL


def _nearest(weight: Tensor, scale: Tensor) -> Tensor:
    return torch.round(weight / scale.unsqueeze(1)).nan_to_num(0.0).clamp(-LARGEST, LARGEST).to(torch.int8)
