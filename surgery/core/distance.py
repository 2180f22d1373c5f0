"""Distance: how far two outputs of a model lie apart, by measures that do not depend on their size."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from surgery.core.arithmetic import exact_float64


class Distance(NamedTuple):
    """Of an output from the one that is held to be true.

    The last three are of logits alone, over the last axis. A distance holds infinities where nothing can be compared.
    """

    error: float  # max|a - b| / max|a|
    angle: float  # 1 - cosine
    kl_mean: float = 0.0  # of KL(a || b), in nats
    kl_max: float = 0.0
    top1: float = 1.0  # the part of the rows whose largest logit is the same one

    def scaled(self, by: float) -> "Distance":
        """What an error `by` times as large would give: angle and KL grow with its square."""
        square = by * by
        return self._replace(
            error=self.error * by,
            angle=self.angle * square,
            kl_mean=self.kl_mean * square,
            kl_max=self.kl_max * square,
        )

    def at_least(self, other: "Distance") -> "Distance":
        """The larger of each measure of size."""
        return self._replace(
            error=max(self.error, other.error),
            angle=max(self.angle, other.angle),
            kl_mean=max(self.kl_mean, other.kl_mean),
            kl_max=max(self.kl_max, other.kl_max),
        )


NOWHERE = Distance(math.inf, math.inf, math.inf, math.inf, 0.0)


def distance(true: Tensor, found: Tensor, logits: bool = False) -> Distance:
    """Of outputs of equal shape; `logits` [..., classes] are compared as such too. NOWHERE if either has a NaN."""
    a, b = _floats(true), _floats(found)
    if a.numel() == 0:
        return Distance(0.0, 0.0)
    size, apart = _largest(a), torch.where(a == b, 0.0, a - b).abs().max()  # equal infinities are not apart
    if not bool(torch.isfinite(apart)):
        return NOWHERE
    told = Distance(float(apart) / size if size else float(apart), _angle(a, b))
    return told if not logits or a.dim() == 0 else told._replace(**_of_logits(a, b))


def half_ulp(like: Tensor, true: Tensor, logits: bool = False) -> Distance:
    """What rounding outputs once to the dtype of `like` may do, which no run in that dtype is below."""
    return within(torch.finfo(like.dtype).eps / 2 if like.is_floating_point() else 0.0, true, logits)


def within(u: float, true: Tensor, logits: bool = False) -> Distance:
    """What outputs may lie apart each of whose elements is off by `u` of itself.

    An error of u, an angle of u^2 / 2; and KL is half the variance of the logits' errors, none of which is
    larger than u max|a|.
    """
    kl = (u * _largest(_floats(true))) ** 2 / 2 if logits else 0.0
    return Distance(u, u * u / 2, kl, kl)


def _floats(values: Tensor) -> Tensor:
    values = torch.view_as_real(values) if values.is_complex() else values
    return exact_float64(values.detach()).cpu()


def _largest(values: Tensor) -> float:
    finite = values[torch.isfinite(values)]
    return float(finite.abs().max()) if finite.numel() else 0.0


def _angle(a: Tensor, b: Tensor) -> float:
    """1 - cosine, as half the square of the chord: exact for small angles, where 1 - cosine itself cancels."""
    finite = torch.isfinite(a)
    a, b = a[finite], b[finite]
    sizes = float(a.norm()), float(b.norm())
    if 0.0 in sizes:
        return 0.0 if sizes[0] == sizes[1] else 1.0
    return float((a / sizes[0] - b / sizes[1]).square().sum()) / 2


def _of_logits(a: Tensor, b: Tensor) -> dict[str, float]:
    a, b = a.flatten(0, -2) if a.dim() > 1 else a[None], b.flatten(0, -2) if b.dim() > 1 else b[None]
    kl, same = _kl(a, b), a.argmax(1) == b.argmax(1)
    return {"kl_mean": float(kl.mean()), "kl_max": float(kl.max()), "top1": float(same.double().mean())}


def _kl(a: Tensor, b: Tensor) -> Tensor:
    """KL(a || b) of logits [rows, classes]: sum of p (e^d - 1 - d), whose terms are not negative and do not cancel."""
    log_p, log_q = a.log_softmax(1), b.log_softmax(1)
    p, d = log_p.exp(), log_q - log_p
    terms = torch.where(p == 0, log_q.exp(), p * (torch.expm1(d) - d))
    return terms.sum(1)
