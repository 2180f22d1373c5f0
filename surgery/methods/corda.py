"""CorDA: A and B start as the parts of a weight that matter most, or least, to the inputs of its layer.

The weight is seen through their covariance C: of U S V' = W C the starts are U sqrt(S) and sqrt(S) V' C^-1, for the
first r parts ("ipm", to learn what examples show) or the last ("kpm", to keep it). https://arxiv.org/abs/2406.05223
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from surgery.core.arithmetic import all_finite
from surgery.core.method import Dense, Params
from surgery.core.site import Site
from surgery.core.starter import Observer
from surgery.errors import ConfigError, ValueRangeError, printable, quoted
from surgery.methods.field_values import check_choice
from surgery.methods.inits import FromBase, halves
from surgery.methods.mean import Mean

_DAMP, _INEXACT = 0.01, 0.05  # of PEFT: what is added to C, and how far its inverse may be off


@dataclass(frozen=True)
class CordaSettings:
    """PEFT's CordaConfig."""

    corda_method: str = "ipm"
    use_float16_for_covariance: bool = False  # sums in the dtype of the inputs
    verbose: bool = False
    prune_temporary_fields: bool = True
    cache_file: str | None = None
    covariance_file: str | None = None

    def __post_init__(self) -> None:
        check_choice("corda_method", self.corda_method, ("ipm", "kpm"))
        for name in ("use_float16_for_covariance", "verbose", "prune_temporary_fields"):
            check_choice(name, getattr(self, name), (True, False))

    def refuse_files(self) -> None:
        """ConfigError where what examples tell is to be kept in a file, or read from one."""
        for name in ("cache_file", "covariance_file"):
            if getattr(self, name) is not None:
                raise ConfigError(
                    f"corda_config: {name} is {quoted(getattr(self, name))}; no such file is read or written "
                    "here; leave it out, and give inject the examples"
                )


class Corda(Observer):
    """The covariance of a layer's inputs, each batch in units of its largest."""

    start = "corda"

    def __init__(self, site: Site, settings: CordaSettings) -> None:
        settings.refuse_files()
        self.name, self.width, self.settings = site.name, site.shape[1], settings
        self.mean = Mean()  # [in, in]

    @property
    def nbytes(self) -> int:
        return 4 * self.width**2

    def see(self, values: Tensor) -> None:
        if not len(values):
            return
        x = values if self.settings.use_float16_for_covariance else values.float()
        x = x / x.max().abs()  # not the largest size: as in PEFT
        products = x.T @ x
        if not all_finite(products):
            raise ValueRangeError(
                f"{printable(self.name)}: the covariance of its inputs is not finite; finite numbers, of which some "
                "are not zero, are wanted; give other examples, or exclude it"
            )
        self.mean.add(products)

    def seen(self) -> bool:
        return self.mean.count > 0

    def begin(self, site: Site, method: FromBase, base: Callable[[], Dense]) -> Params:
        W, r = method.checked_weight(site, base), method.rank
        C, inverse = _invertible(self.mean.value.float().to(W.device))
        U, S, Vh = torch.linalg.svd(W @ C, full_matrices=False)
        part = slice(r) if self.settings.corda_method == "ipm" else slice(-r, None)
        return method.begun(site, *halves(U[:, part], S[part], Vh[part] @ inverse, r, method.positive_scaling(site)))


def _invertible(C: Tensor) -> tuple[Tensor, Tensor]:
    """C with so much added to its diagonal that its inverse is exact enough; and that."""
    unit = torch.eye(len(C), device=C.device)
    damp, size = _DAMP, C.diagonal().mean()
    while True:
        damped = C + damp * size * unit
        inverse = torch.linalg.inv(damped)
        if torch.dist(damped @ inverse, unit) < _INEXACT:
            return damped, inverse
        damp *= 2
