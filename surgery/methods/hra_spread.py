"""What a merge of HRA is off by as its reflections are rounded: by the squares of roundings, in units."""

import torch
from torch import Tensor

from surgery.methods.rotations import FINE


def reflected(V: Tensor, W: Tensor, base: Tensor) -> tuple[Tensor, Tensor]:
    """[out, in]: the squares of what reflections one after another are rounded by, in units; and the Y of `_sizes`.

    Each takes 2 (K u) u^T from K, what came before it: a sum for each row, of 2 n roundings, and a norm for all.
    """
    n = len(V)
    before, after, Y = _sizes(V)
    sums = 8 * n * (W.square() @ before.square()) @ after.square().T
    return sums + 4 * (n + 16) * (base @ Y).square() @ after.square().T, Y


def slanted(V: Tensor, R: Tensor, base: Tensor) -> tuple[Tensor, Tensor]:
    """[out, in]: the squares of what W (I - 2 V V^T) is off by, in units, as Gram-Schmidt makes V; and what it is for
    certain, as ours takes fine products.

    With U = V R of columns of length 1, it makes U + E = (V + D) (R + F), where E is what each element is rounded by,
    2 r times at most, of at most |V| |R|. Of V D^T + D V^T matters, to first order, what E R^-1 moves the span by, and
    what D lacks to be orthogonal, D^T V + V^T D = X R^-1 + (X R^-1)^T: each element of X is off as a sum of n products
    at most 1 in all is, and by the lengths' roundings, of a sum of n squares each. With a = W V, b = V, Y = a R^-T and
    Z = b R^-T the outcome is off by the sum over j and k of X_jk (a_j Z_k + b_j Y_k), and over all of E's elements.
    """
    n, r = V.shape
    back = torch.linalg.inv(R).T
    a, Z, M = base @ V, V @ back, (V.abs() @ R.abs()).square()
    Y, beside = a @ back, base - a @ V.T
    a2, b2, Y2, Z2 = (one.square() for one in (a, V, Y, Z))
    ofs = [one.sum(1) for one in (a2, Z2, Y2, b2)]
    spans = (10 * n + 16 * r + 28) * (torch.outer(ofs[0], ofs[1]) + torch.outer(ofs[2], ofs[3]))
    lengths = (6 * n + 12) * a2 @ b2.T
    moved = (2 * r + 2) * (Y2 @ M.T + (beside.square() @ M) @ Z2.T)
    held = 2 * (r + 1) * torch.outer(base.square() @ ofs[3], ofs[3])  # I - 2 V V^T: a sum of r products, and one more
    fine = n * FINE * V.abs().amax() * M.amax().sqrt()  # each dot
    sizes = [one.abs().sum(1) for one in (a, Z, Y, V)]
    return 4 * (spans + lengths + moved + held), 2 * fine * (torch.outer(*sizes[:2]) + torch.outer(*sizes[2:]))


def _sizes(V: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """[in, r] each: what |u_i| becomes at most by all reflections before it, and by all after it; and Y.

    H = I - 2 (y_1 u_1^T + ... + y_r u_r^T), of y_i = H_1 ... H_(i - 1) u_i; the rows of a rotation have length 1.
    """
    A, G, eye = V.abs(), V.T @ V, torch.eye(V.shape[1], dtype=V.dtype, device=V.device)
    Y = torch.linalg.solve_triangular(eye + 2 * torch.triu(G, 1), V, upper=True, left=False)
    Z = torch.linalg.solve_triangular(eye + 2 * torch.tril(G, -1), V, upper=False, left=False).abs()
    B = A.T @ A
    before, after = A + 2 * Y.abs() @ torch.triu(B, 1), A + 2 * Z @ torch.tril(B, -1)
    return before.clamp(max=1), after.clamp(max=1), Y
