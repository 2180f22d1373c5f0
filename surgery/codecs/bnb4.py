"""bnb 4-bit: the nf4 and fp4 of bitsandbytes, one of 16 values times the largest magnitude of its block.

w[i] = quant_map[code[i]] * absmax[i // blocksize] in float32, over the flattened weight; of two codes in a byte the
first is the high half. With double quantization, absmax[b] = nested_quant_map[absmax[b]] * nested_absmax[b // 256] +
nested_offset. https://arxiv.org/abs/2305.14314
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from surgery.codecs.bitsandbytes_config import told
from surgery.codecs.bnb4_fresh import DTYPES, PART, TINY, codes, scales
from surgery.codecs.bnb4_state import PARTS, STATES, read_state, spelled
from surgery.core.codec import MADE_BY, Headers, Packed, Settings, Shape, TiledCodec, differs


class Bnb4(TiledCodec):
    """Codes in bytes, or in wider elements of the same bytes; absmax by block; and the quant state, JSON in bytes.

    The settings are those of the quant state: quant_type, blocksize, dtype, shape, and where absmax is quantized too
    nested_blocksize and nested_offset.
    """

    name = "bnb4"
    endings: ClassVar[Mapping[str, str]] = {role: f".{role}" for role in ("weight", *PARTS, *STATES)}

    def claims(self, headers: Headers) -> bool:
        return "weight" in headers and not {*PARTS[:2], *STATES}.isdisjoint(headers)

    def read(self, headers: Headers, config: Settings, load: Callable[[str], Tensor]) -> Settings:  # noqa: ARG002
        return read_state(headers, load)

    def shape(self, headers: Headers, settings: Settings) -> Shape:  # noqa: ARG002  # only the state tells
        return tuple(settings["shape"])

    def dtype(self, settings: Settings) -> torch.dtype | None:
        return DTYPES[settings["dtype"]]

    def spans(self, headers: Headers, settings: Settings, rows: slice) -> Mapping[str, slice]:
        part = _Part.of(settings, rows)
        return {
            "weight": part.elements(headers["weight"][0].itemsize),
            "weight.absmax": part.blocks,
            MADE_BY: part.blocks,
        }

    def step(self, headers: Headers, settings: Settings) -> int:
        codes = 2 * headers["weight"][0].itemsize
        return codes // math.gcd(codes, math.prod(settings["shape"][1:]))

    def decode(self, packed: Packed, dtype: torch.dtype) -> Tensor:
        part = _Part.of(packed.settings, packed.rows)
        values = _looked_up(packed, packed.tensors["weight.quant_map"])
        return part.scaled(values[part.within(packed)], _absmax(packed, part)).to(dtype)

    def absmax(self, packed: Packed) -> Tensor:
        """Of each block that the packed rows touch, in float32, [block]."""
        return _absmax(packed, _Part.of(packed.settings, packed.rows)).flatten()

    def encode(self, weight: Tensor, like: Packed) -> Packed:
        part, held = _Part.of(like.settings, like.rows), like.tensors["weight"]
        codes = _looked_up(like, torch.arange(16.0, device=held.device)).to(torch.uint8)
        here = codes[part.within(like)]
        scale = part.spread(_absmax(like, part)).to(torch.float64)
        changed = differs(weight, self.decode(like, weight.dtype)).flatten() & (scale != 0)
        here[changed] = _nearest(weight.flatten()[changed] / scale[changed], like.tensors["weight.quant_map"])
        joined = (codes[::2] << 4) | codes[1::2]
        return like._replace(tensors={**like.tensors, "weight": joined.view(held.dtype).view(held.shape)})

    def scales(self, tiles: Iterable[Tensor], shape: Shape, dtype: torch.dtype, settings: Settings) -> Packed:
        """`settings`: quant_type "nf4" or "fp4", blocksize (64), double_quant (false); the dtype is kept."""
        tensors, state = scales(tiles, shape, dtype, settings)
        raw = torch.frombuffer(bytearray(spelled(state).encode()), dtype=torch.uint8)
        role = f"weight.quant_state.bitsandbytes__{state['quant_type']}"
        return Packed({**tensors, role: raw.to(tensors["weight.absmax"].device)}, state)

    def coded(self, weight: Tensor, by: Packed) -> Packed:
        whole, flat = _Part.of(by.settings, by.rows), weight.flatten()
        absmax, map16 = by.tensors.get(MADE_BY, by.tensors["weight.absmax"]), by.tensors["weight.quant_map"]
        total, found = math.prod(by.settings["shape"]), []
        for part in whole.pieces():
            values = flat[part.first - whole.first : part.last - whole.first].to(torch.float32, copy=True)
            blocks = slice(part.blocks.start - whole.blocks.start, part.blocks.stop - whole.blocks.start)
            found.append(codes(part.divided(values, absmax[blocks], total), map16))
        return by._replace(tensors={**by.tensors, "weight": torch.cat(found)})

    def told(self, settings: Settings, dtype: torch.dtype, plainly: Sequence[str]) -> Settings | None:
        return told(settings["quant_type"], dtype, plainly, double=settings.get("double_quant", False))

    def grid(self, packed: Packed) -> tuple[Tensor, Tensor]:
        part, map16 = _Part.of(packed.settings, packed.rows), packed.tensors["weight.quant_map"]
        absmax = _absmax(packed, part)
        values = torch.tensor(sorted(set(map16.tolist())), device=map16.device)  # the two zeros of fp4 are one
        held = _looked_up(packed, torch.searchsorted(values, map16).to(torch.float32))[part.within(packed)].long()
        ranks = ((held + step).clamp(0, len(values) - 1) for step in (-1, 1))
        pair = [part.scaled(values[rank], absmax).to(torch.float64) for rank in ranks]
        return torch.minimum(*pair), torch.maximum(*pair)  # rounding may leave an absmax just below zero


class _Part(NamedTuple):
    """Some rows of the weight, as a range of its flattened elements."""

    first: int
    last: int
    blocksize: int
    shape: Shape

    @classmethod
    def of(cls, settings: Settings, rows: slice | None) -> "_Part":
        count, *inner = settings["shape"]
        start, stop = (0, count) if rows is None else (rows.start, rows.stop)
        row = math.prod(inner)
        return cls(start * row, stop * row, settings["blocksize"], (stop - start, *inner))

    @property
    def blocks(self) -> slice:
        """Those that the part touches."""
        return slice(self.first // self.blocksize, -(-self.last // self.blocksize))

    def elements(self, itemsize: int) -> slice:
        """Of the tensor of codes, those that the part touches."""
        return slice(self.first // (2 * itemsize), -(-self.last // (2 * itemsize)))

    def within(self, packed: Packed) -> slice:
        """Where the part lies among the codes of `packed`."""
        itemsize = packed.tensors["weight"].itemsize
        start = self.first - 2 * itemsize * self.elements(itemsize).start
        return slice(start, start + self.last - self.first)

    def pieces(self) -> Iterator["_Part"]:
        """Flat ones: some elements at a time, which bounds the memory."""
        for first in range(self.first, max(self.last, self.first + 1), PART):
            last = min(first + PART, self.last)
            yield self._replace(first=first, last=last, shape=(last - first,))

    def divided(self, values: Tensor, absmax: Tensor, total: int) -> Tensor:
        """Each of the part's values over the absmax of its block, as bitsandbytes divides.

        It multiplies by the reciprocal, but in a last block that is not full of all `total` elements.
        """
        over = total % self.blocksize if self.last == total else 0
        last = values[len(values) - min(over, len(values)) :].clone()
        scaled = self.scaled(values, 1.0 / absmax.clamp(min=TINY))
        if len(last):
            scaled[len(scaled) - len(last) :] = last / absmax[-1].clamp(min=TINY)
        return scaled.clamp_(-1, 1)

    def scaled(self, values: Tensor, absmax: Tensor) -> Tensor:
        """Each of the part's values, flat and fresh, times the absmax of its block; in the part's shape."""
        before = self.first - self.blocks.start * self.blocksize
        after = len(absmax) * self.blocksize - before - len(values)
        whole = pad(values, (before, after)) if before or after else values
        scaled = whole.view(-1, self.blocksize).mul_(absmax.unsqueeze(1))  # [block, blocksize]
        return scaled.flatten()[before : before + len(values)].view(self.shape)

    def spread(self, absmax: Tensor) -> Tensor:
        """The absmax of each of the part's elements, flat."""
        ones = torch.ones(self.last - self.first, dtype=absmax.dtype, device=absmax.device)
        return self.scaled(ones, absmax).flatten()


def _looked_up(packed: Packed, table: Tensor) -> Tensor:
    """A float32 of `table` [16] for each code, flat; two at a time, for a lookup is what takes the time."""
    octets = packed.tensors["weight"].contiguous().view(torch.uint8).flatten()
    pairs = torch.cartesian_prod(table, table).view(torch.int64).flatten()  # [256], the high half changes last
    return pairs.index_select(0, octets.to(torch.int32)).view(torch.float32)


def _absmax(packed: Packed, part: _Part) -> Tensor:
    """Of the part's blocks, in float32."""
    absmax, settings = packed.tensors["weight.absmax"], packed.settings
    if "weight.nested_absmax" not in packed.tensors:
        return absmax.to(torch.float32)
    each, blocks = settings["nested_blocksize"], part.blocks
    first, last = blocks.start // each, -(-blocks.stop // each)
    scales = packed.tensors["weight.nested_absmax"][first:last].repeat_interleave(each)
    scale = scales[blocks.start - first * each :][: len(absmax)]
    values = packed.tensors["weight.nested_quant_map"].index_select(0, absmax.flatten().to(torch.int32))
    return values.mul_(scale).add_(settings["nested_offset"])


def _nearest(values: Tensor, map16: Tensor) -> Tensor:
    """The codes of the nearest of the 16 values."""
    ordered, codes = map16.to(torch.float64).sort(stable=True)  # fp4 has two zeros, of which the first is taken
    return codes[torch.bucketize(values, (ordered[1:] + ordered[:-1]) / 2)].to(torch.uint8)
