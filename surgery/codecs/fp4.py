"""fp4: floats of 4 bits (e2m1), two in a byte, the first in its low half."""

import torch
from torch import Tensor

SIZES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)  # by code; those with a sign follow
E2M1 = tuple(sign * size for sign in (1.0, -1.0) for size in SIZES)


def codes_of(octets: Tensor) -> Tensor:
    """[..., bytes] -> [..., 2 bytes], a code in each byte."""
    return torch.stack([octets & 15, octets >> 4], dim=-1).flatten(-2)


def joined(codes: Tensor) -> Tensor:
    """The inverse."""
    return codes[..., ::2] | (codes[..., 1::2] << 4)


def looked_up(octets: Tensor, table: Tensor) -> Tensor:
    """[..., 2 bytes], a float32 of `table` [16] for each code; two at a time."""
    low, high = (torch.arange(256, device=table.device) >> shift & 15 for shift in (0, 4))
    pairs = torch.stack([table[low], table[high]], dim=1).view(torch.int64).flatten()  # [256]
    found = pairs.index_select(0, octets.contiguous().flatten().to(torch.int32)).view(torch.float32)
    return found.view(*octets.shape[:-1], -1)


def nearest(values: Tensor) -> Tensor:
    """Codes of the nearest floats to float64; midway, of the smaller one where its code is even, as floats round."""
    sizes = torch.tensor(SIZES, dtype=torch.float64, device=values.device)
    middles = (sizes[1:] + sizes[:-1]) / 2
    below, above = torch.bucketize(values.abs(), middles), torch.bucketize(values.abs(), middles, right=True)
    code = torch.where(below % 2 == 0, below, above)
    return (code + 8 * torch.signbit(values)).to(torch.uint8)


def neighbours(octets: Tensor, step: int) -> Tensor:
    """[..., 2 bytes], float32, the values next to those of the codes."""
    table = torch.tensor(E2M1, device=octets.device)
    values = torch.tensor(sorted({*E2M1}), device=octets.device)  # with one zero
    rank = torch.searchsorted(values, looked_up(octets, table))
    return values[(rank + step).clamp(0, len(values) - 1)]
