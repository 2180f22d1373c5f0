"""What verify allows a merge of HRA: more than rounding comes to, and not far more, with Gram-Schmidt and without."""

import pytest
import torch
from torch import Tensor

from surgery.core.arithmetic import exact_product
from surgery.core.method import Dense
from surgery.core.op import WHOLE
from surgery.errors import ValueRangeError
from surgery.methods.hra import Hra

OUT = 200
KINDS = ("random", "near one another", "positive", "alike")


def vectors(kind: str, n: int, r: int) -> tuple[Tensor, Tensor]:
    """U [n, r] and W [OUT, n]."""
    torch.manual_seed(0)
    U, W = torch.randn(n, r), torch.randn(OUT, n) / n**0.5
    if kind == "near one another":
        U = U[:, :1] + U * 2**-7
    elif kind == "positive":
        U, W = U.abs(), W.abs()
    elif kind == "alike":  # so that roundings of a sum go one way
        U, W = 1 + U * 2**-5, (1 + W * 2**-5) / n**0.5
    return U, W


def merged_plainly(U: Tensor, W: Tensor, orthogonal: bool) -> Tensor:
    """W H in the dtype of both, in PEFT's order of operations."""
    H = torch.eye(len(U), dtype=U.dtype)
    if orthogonal:
        found: list[Tensor] = []
        for column in U.T:
            rest = column.unsqueeze(1)
            for v in found:
                rest = rest - (v.T @ rest) * v
            found.append(rest / rest.norm())
        V = torch.cat(found, 1)
        return W @ (H - 2 * V @ V.T)
    for column in (U / U.norm(dim=0)).T:
        u = column.unsqueeze(1)
        H = H - 2 * H @ u @ u.T
    return W @ H


@pytest.mark.parametrize("orthogonal", [False, True])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("n", "r"), [(64, 4), (256, 8), (256, 2), (64, 32)])
def test_a_plain_merge_is_within_it_and_comes_near(kind: str, n: int, r: int, orthogonal: bool) -> None:
    U, W = vectors(kind, n, r)
    method = Hra(r, orthogonal=orthogonal, paired=False)
    p = method.prepared({"U": U}, exact_product)
    exact = method.merge(Dense(W.double()), p, WHOLE, exact_product).weight
    allowed = method.strayed(W.double(), torch.zeros_like(exact), p, WHOLE)
    apart = (merged_plainly(U, W, orthogonal).double() - exact).abs()
    assert bool((apart <= allowed).all())
    # The farthest of so many lies 4 to 5 of its 8 roots out, of roundings that come to a third of the largest, in sums
    # of which each part is smaller than the magnitudes are: 7 to 335 times in all. Bounds of whole norms are beyond.
    assert float((allowed / apart).min()) <= 64 * r**0.5


@pytest.mark.parametrize("orthogonal", [False, True])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_a_plain_merge_in_other_dtypes_is_within_it(kind: str, orthogonal: bool, dtype: torch.dtype) -> None:
    U, W = (one.to(dtype) for one in vectors(kind, 128, 6))
    method = Hra(6, orthogonal=orthogonal, paired=False)
    p = method.prepared({"U": U}, exact_product)
    exact = method.merge(Dense(W.double()), p, WHOLE, exact_product).weight
    allowed = method.strayed(W.double(), torch.zeros_like(exact), p, WHOLE)
    assert bool(((merged_plainly(U, W, orthogonal).double() - exact).abs() <= allowed).all())


@pytest.mark.parametrize(("beside", "refused"), [(2.0**-36, False), (-(2.0**-36), True)])
def test_what_gram_schmidt_leaves_is_told_to_the_last_bits(beside: float, refused: bool) -> None:
    left = 2.0**-12 * (1 + beside)
    U = torch.zeros(6, 2, dtype=torch.float64)
    U[0, 0], U[0, 1], U[3, 1] = 1, (1 - left**2) ** 0.5, left  # of length 1
    method = Hra(2, orthogonal=True, paired=False)
    if refused:
        with pytest.raises(ValueRangeError, match=r"apply_GS leaves less than 2\^-12"):
            method.prepared({"U": U}, exact_product)
    else:
        method.prepared({"U": U}, exact_product)
