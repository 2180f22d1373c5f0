"""LoftQ: A and B start as the largest parts of what a weight loses in a format. https://arxiv.org/abs/2310.08659

W = Q + scaling * B A, where Q is the format's W - scaling * B A: both are found in turn, from B A = 0 on. Here the
base stays W, and as of every start that is a part of it, what is trained is what changes from there.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from surgery.core.method import Dense, Params
from surgery.core.site import Site
from surgery.core.starter import Held, Starter
from surgery.errors import StateError, printable
from surgery.methods.field_values import check_choice, check_whole
from surgery.methods.inits import FromBase, halves

_FORMS = {4: "nf4", 8: "int8"}


@dataclass(frozen=True)
class LoftqSettings:
    """PEFT's LoftQConfig."""

    loftq_bits: int = 4
    loftq_iter: int = 1

    def __post_init__(self) -> None:
        check_choice("loftq_bits", self.loftq_bits, tuple(_FORMS))
        check_whole("loftq_iter", self.loftq_iter, 1, 1 << 16)


class Loftq(Starter):
    """Of one weight."""

    start = "loftq"

    def __init__(self, settings: LoftqSettings, held: Held) -> None:
        self.settings, self.held = settings, held

    def begin(self, site: Site, method: FromBase, base: Callable[[], Dense]) -> Params:
        W = method.checked_weight(site, base)
        low, form, scaling = torch.zeros_like(W), _FORMS[self.settings.loftq_bits], method.positive_scaling(site)
        for _ in range(self.settings.loftq_iter):
            lost = W - self.held(form, W - low)  # [out, in]
            if not lost.any():
                raise StateError(
                    f"{printable(site.name)}: {form} holds its weight as it is, so that LoftQ has nothing to start "
                    "from; give the model weights that were not quantized, or start with 'pissa'"
                )
            U, S, Vh = torch.linalg.svd(lost, full_matrices=False)
            B, A = halves(U, S, Vh, method.rank, scaling)
            low = scaling * (B @ A)
        return method.begun(site, B, A)
