"""Fresh 4-bit weights: codes and scales as bitsandbytes makes them on a CPU.

Only the offset of a double quantization is summed otherwise, as a tree: the same bits for any number of threads.
"""

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from surgery.core.arithmetic import tree_sum
from surgery.core.codec import MADE_BY, Settings, Shape, on_meta
from surgery.errors import ConfigError, printable

BLOCKSIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
BLOCKSIZE = 64  # where nothing else is asked for
NESTED = 256  # absmax by block of the double quantization
DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in (torch.float32, torch.bfloat16, torch.float16)}
TINY = 1e-38  # bitsandbytes divides by no less
PART = 1 << 20  # elements at a time, whole blocks of any size: bounds the memory

# The quantiles of a normal distribution, in float32; of a float of 4 bits, those without a sign.
_NF4 = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
    *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
    *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)
_FP4 = (0.0, 0.0625, 8.0, 12.0, 4.0, 6.0, 2.0, 3.0)
KINDS = {"nf4": _NF4, "fp4": tuple(sign * value / 12 + 0.0 for sign in (1, -1) for value in _FP4)}  # no -0


def scales(
    tiles: Iterable[Tensor], shape: Shape, dtype: torch.dtype, settings: Settings
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors by role, and the quant state. ConfigError for what is no setting."""
    kind, blocksize = settings.get("quant_type", "nf4"), settings.get("blocksize", BLOCKSIZE)
    name = str(dtype).removeprefix("torch.")
    if kind not in KINDS or blocksize not in BLOCKSIZES or name not in DTYPES:
        raise ConfigError(
            f"4-bit: {printable(kind)} in blocks of {printable(blocksize)} from {name}; {' or '.join(KINDS)} in "
            f"blocks of {', '.join(map(str, BLOCKSIZES))} from {', '.join(DTYPES)} is wanted"
        )
    state = {"quant_type": kind, "blocksize": blocksize, "dtype": name, "shape": list(shape)}
    absmax = _absmax(tiles, blocksize)
    codes, map16 = on_meta((-(-math.prod(shape) // 2), 1), torch.uint8), torch.tensor(KINDS[kind], device=absmax.device)
    tensors = {"weight": codes, "weight.absmax": absmax, "weight.quant_map": map16}
    if settings.get("double_quant", False):
        offset = torch.tensor(tree_sum(absmax.to(torch.float64)) / len(absmax), dtype=torch.float32)
        state |= {"nested_blocksize": NESTED, "nested_dtype": "float32", "nested_offset": float(offset)}
        tensors |= _nested(absmax - offset.to(absmax.device)) | {MADE_BY: absmax}
    return tensors, state


def _absmax(tiles: Iterable[Tensor], blocksize: int) -> Tensor:
    """Of each block of a flattened weight, in float32; what bitsandbytes divides by in a last one that is not full."""
    found: list[Tensor] = []
    rest: Tensor | None = None  # of a block that the next tile goes on with
    for tile in tiles:
        flat = tile.flatten() if rest is None else torch.cat([rest, tile.flatten()])
        full = len(flat) // blocksize * blocksize
        found.append(flat[:full].view(-1, blocksize).abs().amax(dim=1).to(torch.float32))
        rest = flat[full:].clone()
    assert rest is not None
    if len(rest):
        found.append(rest.abs().amax().to(torch.float32).clamp(min=TINY).view(1))
    return torch.cat(found)


def codes(scaled: Tensor, map16: Tensor) -> Tensor:
    """[bytes, 1] of values from -1 to 1; one midway has the lower neighbour, and after an odd number comes a zero."""
    ordered, ranked = map16.sort(stable=True)
    if len(scaled) % 2:
        scaled = torch.nn.functional.pad(scaled, (0, 1))
    rank = torch.bucketize(scaled, (ordered[:-1] + ordered[1:]) / 2, out_int32=True)
    found = ranked.to(torch.uint8).index_select(0, rank)
    return ((found[::2] << 4) | found[1::2]).unsqueeze(1)


def _nested(absmax: Tensor) -> dict[str, Tensor]:
    """absmax less its offset, in 8 bits by blocks."""
    map256 = _dynamic_map().to(absmax.device)
    padded = torch.nn.functional.pad(absmax, (0, -len(absmax) % NESTED)).view(-1, NESTED)
    largest = padded.abs().amax(dim=1)
    scaled = (padded / largest.unsqueeze(1)).nan_to_num(0.0).flatten()[: len(absmax)]
    above = torch.searchsorted(map256, scaled).clamp(1, 255)
    nearer = (map256[above] - scaled).abs() < (scaled - map256[above - 1]).abs()
    codes = torch.where(nearer, above, above - 1).to(torch.uint8)
    return {"weight.absmax": codes, "weight.nested_absmax": largest, "weight.nested_quant_map": map256}


def _dynamic_map() -> Tensor:
    """256 values whose digits grow with their magnitude: in each decade twice as many as in the one below."""
    positive = []
    for decade in range(7):
        ends = torch.linspace(0.1, 1, (1 << decade) + 1, dtype=torch.float32)
        positive.append(10.0 ** (decade - 6) * ((ends[:-1] + ends[1:]) / 2.0))
    values = torch.cat(positive)
    return torch.cat([values, -values, torch.tensor([0.0, 1.0])]).sort().values
