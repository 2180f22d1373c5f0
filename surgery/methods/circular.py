"""Circular: a product with blocks of circulant matrices, by Fourier transforms of real numbers."""

from typing import Any

import torch
from torch import Tensor
from torch.fft import irfft, rfft


def circular(x: Tensor, w: Tensor) -> Tensor:
    """Output k of block m is the sum over n and t of w[m, n, t] x[n, k + t], around: [*batch, in] -> [*batch, out].

    w is [out / block, in / block, block].
    """
    return _back(torch.einsum("...nf,mnf->...mf", _forth(x, w.shape[1]), rfft(w).conj()), w)


def _forth(x: Tensor, blocks: int) -> Tensor:
    found: Tensor = rfft(x.reshape(*x.shape[:-1], blocks, x.shape[-1] // blocks))
    return found


def _back(values: Tensor, w: Tensor) -> Tensor:
    found: Tensor = irfft(values, n=w.shape[-1]).flatten(-2)
    return found


class Circular(torch.autograd.Function):
    """The same as one step of autograd, which keeps no transform."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor) -> Tensor:
        of_x, of_w = ctx.needs_input_grad
        ctx.save_for_backward(x if of_w else None, w if of_x or of_w else None)
        return circular(x, w)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x, w = ctx.saved_tensors
        of_x, of_w = ctx.needs_input_grad
        G, found_x, found_w = _forth(grad, w.shape[0]), None, None
        if of_x:
            found_x = _back(torch.einsum("...mf,mnf->...nf", G, rfft(w)), w)
        if of_w:
            X = _forth(x, w.shape[1])
            product = torch.einsum("zmf,znf->mnf", G.flatten(0, -3).conj(), X.flatten(0, -3))
            found_w = irfft(product, n=w.shape[-1])
        return found_x, found_w
