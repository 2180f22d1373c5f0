"""PVeRA: VeRA whose d * A x is the mean, and the log of the variance, of what B mixes; merged, it is the mean.

https://arxiv.org/abs/2512.07703
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from surgery.core.spec import Spelling
from surgery.errors import ConfigError
from surgery.methods.field_values import check_whole
from surgery.methods.vera import Vectors, VectorsConfig


@dataclass(frozen=True, kw_only=True)
class PveraConfig(VectorsConfig):
    """PVeRA's settings, named as in PEFT: as VeRA's, of d [2 r] and A [2 r, in], whose first half gives the mean.

    In training B mixes the mean and noise, drawn from torch's own generator; else the mean alone, as once it is merged.

    >>> import surgery, torch
    >>> model = torch.nn.ModuleDict({"up": torch.nn.Linear(4, 6)})
    >>> model = surgery.inject(model, PveraConfig(r=2, target_modules=["up"]))
    >>> list(model["up"].pvera_A["default"].shape), list(model["up"].pvera_lambda_d["default"].shape)
    ([4, 4], [4])
    """

    peft_type: ClassVar[str] = "PVERA"
    spellings: ClassVar[Mapping[str, Spelling]] = {f"pvera_lambda_{role}": Spelling(role) for role in "bd"}
    shared: ClassVar[Mapping[str, str]] = {f"pvera_{role}": role for role in "AB"}
    neutral: ClassVar[Mapping[str, Any]] = {"sample_at_inference": False}
    reasons: ClassVar[Mapping[str, str]] = {
        "sample_at_inference": "it draws another output in each forward, which no merged weight can do; run it in PEFT"
    }
    dropout_field = "pvera_dropout"
    bias_of_adapted = "pvera_only"
    halves = 2

    pvera_dropout: float = 0.0
    generator_seed: int | None = None  # read and written for PEFT: of the noise in training, of which nothing is kept

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.generator_seed is not None:
            check_whole("generator_seed", self.generator_seed, -(1 << 63), (1 << 64) - 1)

    def check_fresh(self) -> None:
        if self.generator_seed is not None:
            raise ConfigError(
                f"generator_seed is {self.generator_seed}; the noise is drawn from torch's own generator; leave it "
                "out, and call torch.manual_seed"
            )

    def method(self, name: str) -> "Pvera":  # noqa: ARG002  # the same at all sites
        return Pvera(1.0, self.r, self.pvera_dropout, float(self.d_initial) if self.init_weights else None)


@dataclass(frozen=True)
class Pvera(Vectors):
    """W + (b * B) (d * A), of the first halves of d and A."""

    name = "PVeRA"
    prefix = "pvera"
    halves = 2

    def hidden(self, h: Tensor, training: bool) -> Tensor:
        mean, log_variance = h.chunk(2, dim=-1)
        return mean + torch.randn_like(mean) * torch.exp(0.5 * log_variance) if training else mean
