"""LoRA that starts as a part of the base: W + scaling * (B A - B0 A0), where A0 and B0 are what A and B began as.

PEFT takes that part out of the base instead, W - scaling * B0 A0, and puts B A over it: the same outputs. Here the base
stays as it is, and files hold what PEFT's conversion writes: the ordinary LoRA of [B, -B0] and [A; A0].
"""

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor
from torch.nn import functional as F

from surgery.core.method import Additive, Dense, Method, Params, Product, Run
from surgery.core.op import Op, Tile, in_dtype_of, onto
from surgery.core.site import Site
from surgery.core.spec import Spec
from surgery.errors import ConfigError, MatchError, printable, quoted
from surgery.methods.eva import Eva
from surgery.methods.lora import Lora

CONVERSION = "path_initial_model_for_weight_conversion"
_ROUNDS = re.compile(r"pissa_niter_([0-9]{1,3})")

_FROM_BASE = frozenset({"pissa", "olora", "loftq", "corda", "lora_ga"})

_UNSERVED: Mapping[str, str] = {
    "mica": "it trains A alone; start with True; what was trained from it is an ordinary LoRA, so that in its config "
    "this may be set to true, as PEFT reads it",
}


def is_from_base(start: object) -> bool:
    """Does an adapter start as a part of the base?"""
    return isinstance(start, str) and (start in _FROM_BASE or _ROUNDS.fullmatch(start) is not None)


def check_init(start: object) -> None:
    """ConfigError for what is no start that is made here."""
    if start in (True, False, "gaussian", "orthogonal", Eva.start) or is_from_base(start):
        return
    why = _UNSERVED.get(start) if isinstance(start, str) else None
    known = (
        "True, False, 'gaussian', 'orthogonal', 'eva', 'pissa', 'pissa_niter_N', 'olora', 'corda', 'lora_ga' and "
        "'loftq' are supported; start with one of them, or train it in PEFT"
    )
    raise ConfigError(f"init_lora_weights is {quoted(start)}; {why or known}")


def joined(p: Params) -> Params:
    """The ordinary LoRA, of twice the rank, that is what has changed since the start."""
    return {"A": torch.cat([p["A"], p["A0"]], 0), "B": torch.cat([p["B"], -p["B0"]], 1)}


@dataclass(frozen=True)
class FromBase(Additive):
    """A and B are trained; A0 and B0 stay."""

    lora: Lora  # of twice the rank, as files hold it
    start: str

    name = "LoRA"

    def tensors(self, site: Site) -> Mapping[str, Spec]:
        op = site.acting
        if op.groups > 1 or op.stack:
            raise MatchError(
                f"{printable(site.name)}: init_lora_weights is {self.start!r}, which is of one matrix, and this is "
                "several, in groups or a stack; start with True there, or exclude it"
            )
        own = replace(self.lora, r=self.lora.r // 2).tensors(site)
        began = {f"{role}0": _fixed(role, spec) for role, spec in own.items()}
        return {**own, **began}

    def reread(self, method: Method, p: Params) -> Params | None:
        if method != self.lora:
            return None
        (A, A0), (B, B0) = p["A"].chunk(2, 0), p["B"].chunk(2, 1)
        return {"A": A, "B": B, "A0": A0, "B0": -B0}

    def matrices(self, p: Params, site: Site) -> Params:
        return self.lora.matrices(joined(p), site)

    def init(self, site: Site, base: Callable[[], Dense]) -> Params:
        weight = self.checked_weight(site, base)
        if self.start == "olora":
            return self.begun(site, *_orthonormal(weight, self.rank))
        return self.begun(site, *self._principal(weight, self.positive_scaling(site)))

    @property
    def rank(self) -> int:
        """Of A and B."""
        return self.lora.r // 2

    def checked_weight(self, site: Site, base: Callable[[], Dense], parts: int = 1) -> Tensor:
        """The weight [out, in] that a start is a part of. ConfigError unless it has `parts` times r singular parts."""
        self.lora.check_start(site)
        weight = base().weight.detach().float()
        most = min(weight.shape) // parts
        if self.rank > most:
            raise ConfigError(
                f"{printable(site.name)}: r is {self.rank}, and init_lora_weights {self.start!r} takes at most "
                f"{most} parts of this weight; choose a smaller r (rank_pattern), or exclude it"
            )
        return weight

    def positive_scaling(self, site: Site) -> float:
        """ConfigError for a start that is to be divided by another."""
        if self.scaling <= 0:
            raise ConfigError(
                f"{printable(site.name)}: its scaling is {self.scaling}, and init_lora_weights {self.start!r} divides "
                "by it and takes the root; give a lora_alpha above 0"
            )
        return self.scaling

    def begun(self, site: Site, B: Tensor, A: Tensor) -> Params:
        """The tensors that start as B [out, r] and A [r, in]."""
        specs = self.tensors(site)
        fresh = {"A": A.reshape(specs["A"].shape).contiguous(), "B": B.reshape(specs["B"].shape).contiguous()}
        return {**fresh, "A0": fresh["A"].clone(), "B0": fresh["B"].clone()}

    def delta(self, p: Params, tile: Tile, product: Product) -> Tensor:
        return self.lora.delta(p, tile, product)

    def spread(self, p: Params, tile: Tile) -> Tensor:
        return self.lora.spread(p, tile)

    def weighted(self, weight: float) -> Self:
        return replace(self, scaling=self.scaling * weight, lora=self.lora.weighted(weight))

    def branch(self, x: Tensor, run: Run, op: Op, p: Params, training: bool) -> Tensor:
        below, dropped = run(x), x
        A, B, A0, B0 = (p[role].flatten(1) for role in ("A", "B", "A0", "B0"))  # of a convolution: [out, in]
        if op.accepts_dropout():
            x = in_dtype_of(A, x)
            dropped = F.dropout(x, self.lora.dropout, training)
        # Alike at the start, so that their difference is zero to the bit.
        moved = op.mix(op.apply(dropped, A), B) - op.mix(op.apply(x, A0), B0)
        return onto(below, moved, self.scaling)

    def _principal(self, weight: Tensor, scaling: float) -> tuple[Tensor, Tensor]:
        """PiSSA: the r largest singular parts. https://arxiv.org/abs/2404.02948"""
        rounds = _ROUNDS.fullmatch(self.start)
        if rounds:
            U, S, V = torch.svd_lowrank(weight, self.rank, niter=int(rounds[1]))
            Vh = V.T
        else:
            U, S, Vh = torch.linalg.svd(weight, full_matrices=False)
        return halves(U, S, Vh, self.rank, scaling)


def halves(U: Tensor, S: Tensor, Vh: Tensor, r: int, scaling: float) -> tuple[Tensor, Tensor]:
    """B [out, r] and A [r, in] of equal size, whose product times the scaling is the first r singular parts."""
    root = (S[:r] / scaling).sqrt()
    return U[:, :r] * root, root.unsqueeze(1) * Vh[:r]


def _orthonormal(weight: Tensor, r: int) -> tuple[Tensor, Tensor]:
    """OLoRA: the first r columns of Q, and rows of R. https://arxiv.org/abs/2406.01775"""
    Q, R = torch.linalg.qr(weight)
    return Q[:, :r], R[:r]


def _fixed(role: str, spec: Spec) -> Spec:
    return spec._replace(spelling=spec.spelling.replace(f"_{role}", f"_{role}0"), fixed=True)


def doubled(r: int, alpha: float, rank_stabilized: bool) -> tuple[int, float]:
    """Rank and alpha of the ordinary LoRA, for the same scaling."""
    return 2 * r, alpha * (math.sqrt(2) if rank_stabilized else 2)
