"""Inverses of matrices whose symmetric part is the identity: row by row up to 32, by blocks beyond."""

import pytest
import torch

from surgery.core.arithmetic import ExactProduct
from surgery.methods.rotations import FINE, inverse


@pytest.mark.parametrize("n", [1, 2, 31, 32, 33, 70])
def test_an_inverse_is_one(n: int):
    """Within six fine products at each of two levels, of n terms, carried on by matrices of norms up to 2."""
    torch.manual_seed(0)
    Q = torch.randn(3, n, n).double()
    Q = Q - Q.mT
    A = torch.eye(n) + Q / torch.linalg.matrix_norm(Q, 2, keepdim=True).clamp(min=1)
    off = (A @ inverse(A, ExactProduct()) - torch.eye(n)).abs().max()
    assert float(off) <= 2 * 6 * n * FINE * 2


def test_the_inverse_of_some_is_that_of_each_to_the_bit():
    torch.manual_seed(0)
    Q = torch.randn(3, 40, 40).double() / 40
    A = torch.eye(40) + Q - Q.mT
    each = torch.cat([inverse(one, ExactProduct()) for one in A.split(1)])
    assert torch.equal(inverse(A, ExactProduct()), each)
