"""Stacks: LoRA over a parameter that is a matrix for each expert, in PEFT's layout.

A is [stack * r, in], an expert's rows together; B is [out, stack * r], whose columns are r times one for each expert.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from surgery.core.method import Params, Product
from surgery.core.op import Op, Tile
from surgery.core.site import Site
from surgery.errors import MatchError, printable


def shapes(site: Site, r: int) -> dict[str, tuple[int, ...]]:
    """Of A and B."""
    op, (rows, columns) = site.acting, site.shape
    if not rows or not columns:
        raise MatchError(f"{printable(site.name)}: {list(site.weight.shape)}, without an element; exclude it")
    rows //= op.stack
    in_features, out_features = (rows, columns) if op.swapped else (columns, rows)
    return {"A": (op.stack * r, in_features), "B": (out_features, op.stack * r)}


def by_expert(p: Params, op: Op) -> Params:
    """A as [stack, r, in] and B as [stack, out, r]; where the rows are inputs, each in the other's place."""
    A = p["A"].view(op.stack, -1, p["A"].shape[1])  # [stack, r, in]
    B = p["B"].view(p["B"].shape[0], -1, op.stack).permute(2, 0, 1)  # [stack, out, r]
    return {"A": B.mT, "B": A.mT} if op.swapped else {"A": A, "B": B}


def stacked(each: Sequence[Params], op: Op) -> Params:
    """The inverse of `by_expert`, of matrices; experts of lower rank than others have zeros for the rest."""
    A, B = ([one[role] for one in each] for role in (("B", "A") if op.swapped else ("A", "B")))
    if op.swapped:
        A, B = [one.mT for one in A], [one.mT for one in B]
    r = max(len(one) for one in A)
    rows = [F.pad(one, (0, 0, 0, r - len(one))) for one in A]  # [r, in]
    columns = [F.pad(one, (0, r - one.shape[1])) for one in B]  # [out, r]
    return {"A": torch.cat(rows), "B": torch.stack(columns, -1).flatten(1)}


def delta(p: Params, tile: Tile, product: Product, scaling: float) -> Tensor:
    """[stack * rows, columns] of the tile."""
    A, B = p["A"], p["B"]
    if tile[0] == slice(None):
        return product(B, A, tile, scaling).flatten(0, 1)
    return torch.cat([product(B[one], A[one], part, scaling) for one, part in parts(tile, B.shape[1])])


def parts(tile: Tile, rows_each: int) -> list[tuple[int, Tile]]:
    """The experts that a tile holds something of, and what of each."""
    rows, columns = tile
    first, last = rows.start // rows_each, (rows.stop - 1) // rows_each
    found = []
    for one in range(first, last + 1):
        begin = one * rows_each
        part = slice(max(rows.start - begin, 0), min(rows.stop - begin, rows_each))
        found.append((one, (part, columns)))
    return found
