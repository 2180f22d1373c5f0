"""The leading singular values of a matrix by a seeded random range finder. https://arxiv.org/abs/0909.4061"""

from dataclasses import dataclass

import torch
from torch import Tensor

from surgery.core.option_checks import check_whole, is_number
from surgery.core.source import TILE_ELEMENTS, row_tiles
from surgery.errors import UsageError, printable
from surgery.procedures.making.combinations import Factors

_SPARE = 8  # directions looked for beyond those that are kept, so that these come out as the best ones
_PASSES = 3  # over the matrix; each sharpens what is found
_FIRST = 16  # rank tried first where only an energy is asked for


@dataclass(frozen=True)
class Truncation:
    """How much of a matrix is kept: at most `rank`, and no more than what holds `energy` of its squared norm."""

    rank: int | None = None
    energy: float | None = None

    def __post_init__(self) -> None:
        if self.rank is None and self.energy is None:
            raise UsageError("neither `rank` nor `energy` is given; one is wanted, such as `rank=16` or `energy=0.99`")
        if self.rank is not None:
            check_whole("`rank`", self.rank, 1)
        if self.energy is not None and not (is_number(self.energy) and 0 < self.energy <= 1):
            raise UsageError(f"`energy` is {printable(repr(self.energy))}; one above 0 and at most 1 is wanted")

    def kept(self, squares: Tensor, whole: float) -> int | None:
        """Of singular values' squares, largest first, with the squared norm of all; None if these are too few."""
        enough = len(squares) if self.energy is None else int((squares.cumsum(0) < self.energy * whole).sum()) + 1
        found = min(enough, self.rank or enough)
        return found if found <= len(squares) else None


def low_rank(matrix: Tensor, truncation: Truncation) -> Factors:
    """float32 factors of about the best B A for `matrix`, float64 and not zero; each gets the root of the values."""
    largest = float(matrix.abs().max())
    scaled = (matrix / largest).float()  # [out, in]; so that no square leaves float32
    U, S, V = _leading(scaled, truncation)
    root = (S * largest).sqrt()
    return Factors((root[:, None] * V.T).float().contiguous(), (U * root).float().contiguous())


def residual_norm(matrix: Tensor, factors: Factors) -> float:
    """||matrix - B A||, Frobenius, of a float64 matrix, a tile at a time."""
    A, B = factors.A.double(), factors.B.double()
    tiles = row_tiles(tuple(matrix.shape), TILE_ELEMENTS)
    return float(torch.stack([(matrix[rows] - B[rows] @ A).norm() for rows in tiles]).norm())


def _leading(matrix: Tensor, truncation: Truncation) -> tuple[Tensor, Tensor, Tensor]:
    """U [out, r], S [r] and V [in, r], in float64."""
    whole, least = float(matrix.double().square().sum()), min(matrix.shape)
    sought = min(truncation.rank or _FIRST, least)
    while True:
        U, S, V = _found(matrix, sought + _SPARE)
        r = truncation.kept(S[:sought].square(), whole)
        r = least if r is None and sought == least else r
        if r is not None:
            return U[:, :r], S[:r], V[:, :r]
        sought = min(2 * sought, least)


def _found(matrix: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    if 2 * count >= min(matrix.shape):
        U, S, Vh = torch.linalg.svd(matrix.double(), full_matrices=False)
        return U, S, Vh.T
    draws = torch.Generator().manual_seed(0)
    Q = torch.linalg.qr(matrix @ torch.randn(matrix.shape[1], count, generator=draws)).Q  # [out, count]
    for _ in range(_PASSES):
        Q = torch.linalg.qr(matrix @ torch.linalg.qr(matrix.T @ Q).Q).Q
    U, S, Vh = torch.linalg.svd((Q.T @ matrix).double(), full_matrices=False)  # of [count, in]
    return Q.double() @ U, S, Vh.T
