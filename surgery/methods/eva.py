"""EVA: A starts as the directions in which a layer's inputs vary most, and ranks go where they explain most.

B starts at zero, so that the base and its outputs stay. https://arxiv.org/abs/2410.07170
"""

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from surgery.core.method import Dense, Method, Params
from surgery.core.select import patterned
from surgery.core.site import Site
from surgery.core.starter import Observer
from surgery.errors import ConfigError
from surgery.methods.field_values import check_between, check_choice, check_whole

_ROUNDS, _SEED = 4, 42  # of the randomized SVD, as in PEFT, so that the same directions are found
_NOTHING = torch.finfo(torch.float32).eps  # a share of the variance that is rounding alone
_MOST = 1 << 31


@dataclass(frozen=True)
class EvaSettings:
    """PEFT's EvaConfig."""

    rho: float = 2.0  # no layer has a rank above rho * r
    tau: float = 0.99  # cosine of a direction before and after a batch, from which on it is settled
    use_label_mask: bool = True
    label_mask_value: int = -100
    whiten: bool = False
    adjust_scaling_factors: bool = True  # alpha follows the rank, so that the scaling stays

    def __post_init__(self) -> None:
        check_between("rho", self.rho, 1, _MOST)
        check_between("tau", self.tau, 0, 1)
        for name in ("use_label_mask", "whiten", "adjust_scaling_factors"):
            check_choice(name, getattr(self, name), (True, False))
        check_whole("label_mask_value", self.label_mask_value, -_MOST, _MOST)


class Eva(Observer):
    """The principal directions of a layer's inputs, brought up to date by each batch."""

    start = "eva"
    until_settled = True

    def __init__(self, site: Site, r: int, settings: EvaSettings) -> None:
        self.r, self.settings = r, settings
        self.left_out = settings.label_mask_value if settings.use_label_mask else None
        self.width = site.shape[1]
        self.most = min(round(r * settings.rho), site.shape[1])
        self.rank = self.most  # how many of its directions are wanted, as things stand
        self.directions = _Directions(self.most)
        self.before: Tensor | None = None

    @property
    def nbytes(self) -> int:
        return 4 * self.most * self.width

    def see(self, values: Tensor) -> None:
        if len(values) and not self.settled():
            self.before = self.directions.V
            self.directions.add(values)

    def seen(self) -> bool:
        return self.directions.V is not None

    def settled(self) -> bool:
        """Did the last batch leave those that are wanted as they were?"""
        now, before = self.directions.V, self.before
        if now is None or before is None or len(before) < self.rank:
            return False
        cosines = torch.cosine_similarity(now[: self.rank], before[: self.rank])
        return bool((cosines >= self.settings.tau).all())

    def begin(self, site: Site, method: Method, base: Callable[[], Dense]) -> Params:
        assert self.directions.V is not None
        A = self.directions.V[: self.rank]  # [r, in]
        if self.settings.whiten:
            A = A / self.directions.S[: self.rank].sqrt().unsqueeze(1)
        return {**method.init(site, base), "A": A.cpu().contiguous()}


def is_settled(observers: Mapping[str, Eva]) -> bool:
    """Are all directions that the layers get settled?"""
    if not all(one.seen() for one in observers.values()):
        return False
    _allot(observers)
    return all(one.settled() for one in observers.values())


def _allot(observers: Mapping[str, Eva]) -> None:
    """Lay down how many directions each layer gets: of all together those that explain most, as many as r sums to."""
    budget = sum(one.r for one in observers.values())
    shares = [
        (share, name)
        for name, one in observers.items()
        for share in one.directions.explained()[: one.most]
        if share > _NOTHING
    ]
    taken = Counter(name for _, name in islice(sorted(shares, key=lambda found: -found[0]), budget))
    for name, one in observers.items():
        one.rank = taken[name]


def patterns_of(observers: Mapping[str, Eva], alphas: Mapping[str, float]) -> dict[str, Any]:
    """The config's `rank_pattern` and `alpha_pattern` for ranks other than r; nothing where all are r."""
    if all(one.rank == one.r for one in observers.values()):
        return {}
    for name, one in observers.items():
        if one.settings.adjust_scaling_factors:
            alphas = {**alphas, name: alphas[name] * one.rank / one.r}
    found = {
        "rank_pattern": patterned({name: one.rank for name, one in observers.items()}),
        "alpha_pattern": patterned(alphas),
    }
    if None in found.values():
        raise ConfigError(
            "names of modules differ by a dot alone, and EVA gives them different ranks; set rho to 1 in eva_config"
        )
    return found


class _Directions:
    """Principal components of rows that come a few at a time: those so far, weighted, stand for the rows so far."""

    def __init__(self, most: int) -> None:
        self.most, self.rows, self.scatter = most, 0, 0.0
        self.mean = torch.zeros(0)
        self.S = torch.zeros(0)
        self.V: Tensor | None = None  # [most, in], at first fewer

    def add(self, x: Tensor) -> None:
        """[rows, in]"""
        x = x.float()
        mean = x.mean(0, dtype=torch.float64)
        laid = [centred := (x - mean).float()]
        self.scatter += float(centred.square().sum(dtype=torch.float64))
        total = self.rows + len(x)
        if self.V is not None:
            # The means of both parts, as one more row: what they lie apart is variance too.
            apart = (self.rows * len(x) / total) ** 0.5 * (self.mean - mean)
            self.scatter += float(apart.square().sum())
            laid = [self.S.unsqueeze(1) * self.V, centred, apart.float().unsqueeze(0)]
            mean = (self.rows * self.mean + len(x) * mean) / total
        self.S, self.V = _leading(torch.cat(laid), self.most)
        self.mean, self.rows = mean, total

    def explained(self) -> list[float]:
        """The part of all variance along each, the largest first."""
        return [] if not self.scatter else (self.S.double().square() / self.scatter).tolist()


def _leading(laid: Tensor, most: int) -> tuple[Tensor, Tensor]:
    """The largest singular values and their right vectors, each with its largest number above zero."""
    devices = [laid.device] if laid.is_cuda else []
    with torch.random.fork_rng(devices):
        torch.manual_seed(_SEED)
        _, S, V = torch.svd_lowrank(laid, q=min(2 * most, *laid.shape), niter=_ROUNDS)
    S, V = S[:most], V.T[:most]
    largest = V.gather(1, V.abs().argmax(1, keepdim=True))
    return S, V * largest.sign()
