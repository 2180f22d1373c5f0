"""fp8: floats of 8 bits times a scale for each block (DeepSeek, Qwen), each row, or one for all.

w = code * scale in float32. Blocks at the edges may be cut; scales may be powers of two in a byte, 2^(byte - 127).
https://arxiv.org/abs/2412.19437, section 3.3
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from surgery.codecs.compressed_config import told_values
from surgery.core.arithmetic import power_of_two
from surgery.core.codec import MADE_BY, Headers, Packed, Settings, Shape, TiledCodec, differs, on_meta
from surgery.errors import ConfigError, FormatError, printable

FLOATS = (torch.float8_e4m3fn, torch.float8_e5m2)
SCALES = ("weight_scale_inv", "weight_scale")  # by whichever name, it is what a code is multiplied by
BLOCK = (128, 128)
ZERO = "weight_zero_point"
_SCALE_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.uint8)


class Fp8(TiledCodec):
    """Codes [out, in] and scales [out blocks, in blocks], [out], [out, 1] or []; what activations are scaled by.

    The setting `weight_block_size` is (out, in) of a block, whatever the scales' shape.
    """

    name = "fp8_block"
    scaled_by: ClassVar[tuple[str, ...]] = SCALES
    endings: ClassVar[Mapping[str, str]] = {
        role: f".{role}" for role in ("weight", *SCALES, "activation_scale", "input_scale", "input_scale_ub", ZERO)
    }

    def claims(self, headers: Headers) -> bool:
        return headers.get("weight", (None,))[0] in FLOATS and len(headers.keys() & set(self.scaled_by)) == 1

    def read(self, headers: Headers, config: Settings, load: Callable[[str], Tensor]) -> Settings:  # noqa: ARG002
        (_, shape), (dtype, scales) = headers["weight"], headers[_role(headers)]
        if len(shape) != 2 or dtype not in _SCALE_DTYPES:
            raise FormatError(
                f"fp8 codes {list(shape)} with scales in {str(dtype).removeprefix('torch.')}; a matrix with scales in "
                "float32, bfloat16, float16 or bytes is wanted; this layout is not supported"
            )
        if ZERO in headers:
            raise FormatError(f"fp8 codes with a {ZERO}, which is not supported; dequantize it first")
        for role, (_, extents) in headers.items():
            if role not in {"weight", _role(headers)} and math.prod(extents) > shape[1]:
                raise FormatError(f"fp8 {role} {list(extents)}; one for each input at most is wanted; is it damaged?")
        return {"weight_block_size": _block(shape, scales, config)}

    def shape(self, headers: Headers, settings: Settings) -> Shape:  # noqa: ARG002  # it is that of the codes
        return headers["weight"][1]

    def spans(self, headers: Headers, settings: Settings, rows: slice) -> Mapping[str, slice]:
        role, height = _role(headers), settings["weight_block_size"][0]
        blocks = slice(rows.start // height, -(-rows.stop // height))
        one = not headers[role][1] or headers[role][1][0] == 1
        return {"weight": rows} if one else {"weight": rows, role: blocks, MADE_BY: blocks}

    def decode(self, packed: Packed, dtype: torch.dtype) -> Tensor:
        return _times(_numbers(packed.tensors["weight"]), _single(packed), packed).to(dtype)

    def encode(self, weight: Tensor, like: Packed) -> Packed:
        codes = like.tensors["weight"]
        wanted = _nearest(weight.to(torch.float64) / _scales(like), codes.dtype)
        changed = differs(weight, self.decode(like, weight.dtype))
        # Chosen by bytes: torch has no `where` of these floats on every device.
        held = torch.where(changed, wanted.view(torch.uint8), codes.view(torch.uint8)).view(codes.dtype)
        return like._replace(tensors={**like.tensors, "weight": held})

    def grid(self, packed: Packed) -> tuple[Tensor, Tensor]:
        codes, scales = packed.tensors["weight"], _scales(packed)
        every = _every(codes)
        values = torch.tensor(sorted({*every[every.isfinite()].tolist()}), device=codes.device)  # with one zero
        held = _numbers(codes)
        rank = torch.searchsorted(values, held.nan_to_num(0.0))
        pair = [
            torch.where(held.isfinite(), values[(rank + step).clamp(0, len(values) - 1)], held) * scales
            for step in (-1, 1)
        ]
        return torch.minimum(*pair).to(torch.float64), torch.maximum(*pair).to(torch.float64)


class Fp8Block(Fp8):
    """Fresh weights are those of transformers: by block, with scales in float32."""

    def scales(self, tiles: Iterable[Tensor], shape: Shape, dtype: torch.dtype, settings: Settings) -> Packed:  # noqa: ARG002  # as float32
        """`settings`: weight_block_size (128, 128). The codes and scales are those of transformers."""
        block = tuple(settings.get("weight_block_size") or BLOCK)
        if len(shape) != 2 or not _is_block(block):
            raise ConfigError(
                f"fp8: {list(shape)} in blocks of {printable(block)}; a matrix and two whole numbers are wanted"
            )
        tops = _tops(torch.cat([_tops_of_rows(tile, block[1]) for tile in tiles]), block[0])
        factors = torch.where(tops > 0, torch.finfo(FLOATS[0]).max / tops, 1.0)
        tensors = {"weight": on_meta(shape, FLOATS[0]), SCALES[0]: 1.0 / factors, MADE_BY: factors}
        return Packed(tensors, {"weight_block_size": block})

    def coded(self, weight: Tensor, by: Packed) -> Packed:
        largest = torch.finfo(FLOATS[0]).max
        held = _times(weight.to(torch.float32, copy=True), by.tensors[MADE_BY], by).clamp_(-largest, largest)
        return by._replace(tensors={**by.tensors, "weight": held.to(FLOATS[0])})

    def told(self, settings: Settings, dtype: torch.dtype, plainly: Sequence[str]) -> Settings | None:  # noqa: ARG002
        block = list(settings.get("weight_block_size") or BLOCK)
        told = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": block}
        return told | {"modules_to_not_convert": list(plainly)}


def _role(headers: Mapping[str, Any]) -> str:
    return next(role for role in SCALES if role in headers)


def _scales(packed: Packed) -> Tensor:
    """float32, broadcast over the packed rows."""
    return _by_rows(_wide(_single(packed), packed), packed)


def _single(packed: Packed) -> Tensor:
    """The scales as they are held, in float32."""
    held = packed.tensors[_role(packed.tensors)]
    return (power_of_two(held.to(torch.int64) - 127) if held.dtype == torch.uint8 else held).to(torch.float32)


def _times(values: Tensor, scales: Tensor, packed: Packed) -> Tensor:
    """`values` of the packed rows, in whose memory each is multiplied by the scale of its block."""
    wide, height = _wide(scales, packed), packed.settings["weight_block_size"][0]
    if len(values) == len(wide) * height:  # whole blocks, for which nothing as large as they is made
        return values.view(len(wide), height, values.shape[1]).mul_(wide.unsqueeze(1)).view(values.shape)
    return values.mul_(_by_rows(wide, packed))


def _wide(scales: Tensor, packed: Packed) -> Tensor:
    """One row for each block of rows, [blocks, in or 1]."""
    width, columns = packed.settings["weight_block_size"][1], packed.tensors["weight"].shape[1]
    matrix = scales if scales.dim() == 2 else scales.view(-1, 1)
    return matrix.repeat_interleave(width, dim=1)[:, :columns] if matrix.shape[1] > 1 else matrix


def _by_rows(wide: Tensor, packed: Packed) -> Tensor:
    """One row for each of the packed rows, or one for all of them."""
    if len(wide) < 2:
        return wide
    height, count = packed.settings["weight_block_size"][0], len(packed.tensors["weight"])
    first = 0 if packed.rows is None else packed.rows.start
    rows = torch.arange(first, first + count, device=wide.device) // height - first // height
    return wide.index_select(0, rows)


def _every(codes: Tensor) -> Tensor:
    """What each code stands for, [256], in float32."""
    return torch.arange(256, dtype=torch.uint8, device=codes.device).view(codes.dtype).to(torch.float32)


def _numbers(codes: Tensor) -> Tensor:
    """In float32; looked up, for torch takes several times as long to convert them."""
    octets = codes.contiguous().view(torch.uint8).flatten()
    return _every(codes).index_select(0, octets.to(torch.int32)).view(codes.shape)


def _nearest(values: Tensor, dtype: torch.dtype) -> Tensor:
    largest = torch.finfo(dtype).max  # beyond it the conversion gives NaN, not the largest
    return _to_odd(values.to(torch.float64).clamp(-largest, largest)).to(dtype)


def _to_odd(values: Tensor) -> Tensor:
    """float64 as the one of the two float32 around it whose last bit is set, so that it can be rounded once more."""
    single = values.to(torch.float32)
    near, bits = single.to(torch.float64), single.view(torch.int32)
    outwards = torch.where(values.abs() > near.abs(), 1, -1).to(torch.int32)
    return torch.where((near != values) & (bits & 1 == 0), bits + outwards, bits).view(torch.float32)


def _block(shape: Shape, scales: Shape, config: Settings) -> tuple[int, int]:
    """(out, in) of a block. FormatError where no blocks of one size have so many scales."""
    rows, columns = shape
    if scales in {(), (1,), (1, 1)}:
        return max(rows, 1), max(columns, 1)
    if scales in {(rows,), (rows, 1)}:
        return 1, max(columns, 1)
    blocks = [config.get("weight_block_size"), *told_values(config, "block_structure", "float-quantized")]
    told = next((tuple(one) for one in blocks if isinstance(one, list | tuple)), ())
    for height, width in [told, BLOCK] if _is_block(told) else [BLOCK]:
        if scales == (-(-rows // height), -(-columns // width)):
            return height, width
    raise FormatError(
        f"fp8 codes {list(shape)} with scales {list(scales)}; one for each block of {printable(list(told or BLOCK))}, "
        "each row, or for all is wanted; is weight_block_size of config.json right?"
    )


def _is_block(block: tuple[Any, ...]) -> bool:
    return len(block) == 2 and all(type(extent) is int and extent > 0 for extent in block)


def _tops_of_rows(weight: Tensor, width: int) -> Tensor:
    """The largest of each row's blocks, in float32, [out, in blocks]."""
    magnitudes = torch.nn.functional.pad(weight.to(torch.float32).abs(), (0, -weight.shape[1] % width))
    return magnitudes.view(len(weight), -(-weight.shape[1] // width), width).amax(dim=2)


def _tops(of_rows: Tensor, height: int) -> Tensor:
    """The largest of each block, [out blocks, in blocks]."""
    rows, blocks = of_rows.shape
    padded = torch.nn.functional.pad(of_rows, (0, 0, 0, -rows % height))
    return padded.view(-(-rows // height), height, blocks).amax(dim=1)
