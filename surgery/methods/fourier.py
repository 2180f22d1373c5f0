"""Fourier: a linear map whose weight is real(ifft2(S)), by real transforms: of its inputs, or of what S adds up to.

S is [out, in] and holds c [count] at `half`: its rows, and its columns up to in / 2, beyond which a number acts as it
would at the opposite row and column.
"""

from typing import Any

import torch
from torch import Tensor
from torch.fft import ifft, irfft, rfft, rfft2
from torch.nn import functional as F

from surgery.methods.drawn_places import places


def half_places(c: Tensor, seed: int, shape: tuple[int, int]) -> Tensor:
    """[2, count]: rows and columns of S, drawn by this seed for the numbers c, where real transforms hold them."""
    at = places(c, seed, shape)
    opposite = torch.stack([-at[0] % shape[0], -at[1] % shape[1]])
    return torch.where(2 * at[1] > shape[1], opposite, at)


def transformed(c: Tensor, half: Tensor, shape: tuple[int, int]) -> Tensor:
    """real(ifft2(S)), [out, in]; c is in float32 or float64."""
    (u, v), (out_features, in_features) = half.unbind(), shape
    width = in_features // 2 + 1
    both = torch.cat([u, -u % out_features]) * width + v.repeat(2)
    # A column that is its own opposite holds half of a number at either row; of the others, half is left out.
    alone = ((v == 0) | (2 * v == in_features)).to(c.dtype)
    S = c.new_zeros(out_features * width).index_add(0, both, torch.cat([c, c * alone]) / 2)
    found: Tensor = irfft(ifft(S.view(out_features, width), dim=0), n=in_features)
    return found


class Laid(torch.autograd.Function):
    """x (W + real(ifft2(S)))^T + bias, where of S the numbers alone get a gradient."""

    @staticmethod
    def forward(  # noqa: PLR0913, PLR0917  # autograd passes no values but tensors and numbers
        ctx: Any, x: Tensor, W: Tensor, bias: Tensor | None, c: Tensor, half: Tensor, shape: tuple[int, int]
    ) -> Tensor:
        of_W, of_c = ctx.needs_input_grad[1], ctx.needs_input_grad[3]
        ctx.save_for_backward(x if of_W or of_c else None, W, c, half)
        ctx.shape = shape
        return F.linear(x, W + transformed(c, half, shape), bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, W, c, half = ctx.saved_tensors
        of_x, of_W, of_bias, of_c, *_ = ctx.needs_input_grad
        rows = grad.reshape(-1, grad.shape[-1])  # [batch, out]
        found: list[Tensor | None] = [None] * 6
        if of_x:
            found[0] = grad @ (W + transformed(c, half, ctx.shape))
        if of_bias:
            found[2] = rows.sum(0)
        if of_W or of_c:
            of_both = rows.T @ x.reshape(-1, x.shape[-1])  # [out, in]
            found[1] = of_both if of_W else None
            found[3] = _sampled(of_both, half) if of_c else None
        return tuple(found)


def _sampled(grad: Tensor, half: Tensor) -> Tensor:
    """What c gets of the gradient [out, in]: its cosines, which are the transform's real part."""
    u, v = half.unbind()
    found: Tensor = rfft2(grad).real[u, v] / grad.numel()
    return found


class Spectral(torch.autograd.Function):
    """x real(ifft2(S))^T by transforms of x and of the outputs, between which each number of S is a product."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, c: Tensor, half: Tensor, shape: tuple[int, int]) -> Tensor:
        of_x, of_c = ctx.needs_input_grad[:2]
        ctx.save_for_backward(x if of_c else None, c if of_x or of_c else None, half)
        ctx.shape = shape
        rows, columns, turned = _between(half, shape, c)
        return _back(_mixed(_forth(x), _parts(c, turned), columns, rows, shape[0]), x, *shape)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, c, half = ctx.saved_tensors
        of_x, of_c = ctx.needs_input_grad[:2]
        (out_features, in_features), found_x, found_c = ctx.shape, None, None
        rows, columns, turned = _between(half, ctx.shape, grad)
        G = _forth(grad)
        if of_x:
            found_x = _back(_mixed(G, _parts(c, turned), rows, columns, in_features), grad, in_features, out_features)
        if of_c:
            X = _forth(x)
            real, imaginary = ((g[rows] * one[columns]).sum(1) for g, one in zip(G, X, strict=True))
            found_c = (real + turned * imaginary) / (out_features * in_features)
        return found_x, found_c, None, None


def _between(half: Tensor, shape: tuple[int, int], like: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Rows and columns among those of real transforms, and how imaginary parts turn: 0 where there is none."""
    (u, v), (out_features, in_features) = half.unbind(), shape
    back = 2 * u > out_features
    rows = torch.where(back, out_features - u, u)
    none = (rows == 0) | (2 * rows == out_features) | (v == 0) | (2 * v == in_features)
    return rows, v, torch.where(none, 0.0, torch.where(back, 1.0, -1.0)).to(like.dtype)


def _forth(x: Tensor) -> Tensor:
    """[2, frequencies, batch]: real and imaginary parts."""
    X = rfft(x.reshape(-1, x.shape[-1])).T
    return torch.stack([X.real, X.imag])


def _parts(c: Tensor, turned: Tensor) -> Tensor:
    """[2, count]: what real and imaginary parts are multiplied by."""
    return torch.stack([c, c * turned])


def _mixed(X: Tensor, by: Tensor, source: Tensor, target: Tensor, count: int) -> Tensor:
    """The same of what comes out, in so many numbers."""
    held = X.new_zeros(count // 2 + 1, X.shape[2])
    return torch.stack([held.index_add(0, target, one[source] * c.unsqueeze(1)) for one, c in zip(X, by, strict=True)])


def _back(Y: Tensor, like: Tensor, count: int, other: int) -> Tensor:
    """[*batch, count] of sums of cosines and sines, over `other`: a real transform takes all but its ends twice."""
    Y = torch.cat([Y[:, :1], Y[:, 1:] / 2], 1) if count % 2 else torch.cat([Y[:, :1], Y[:, 1:-1] / 2, Y[:, -1:]], 1)
    found: Tensor = irfft(torch.complex(*Y).T, n=count) / other
    return found.view(*like.shape[:-1], count)
