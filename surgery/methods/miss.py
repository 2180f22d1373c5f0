"""MiSS: W + D^T at each block of r inputs; D is one for all of them. https://arxiv.org/abs/2409.15371

In PEFT's "mini" form D is repeated over the outputs too.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from surgery.core.method import Dense, Params, Run
from surgery.core.op import Op, Tile, in_dtype_of, onto
from surgery.core.site import Site
from surgery.core.spec import Spec, Spelling
from surgery.errors import ConfigError, MatchError, printable, quoted
from surgery.methods.acts_on import only_linear
from surgery.methods.bias_config import BiasConfig
from surgery.methods.field_values import check_count, check_dropout
from surgery.methods.kaiming import kaiming
from surgery.methods.placed import Placed

Init = bool | Literal["mini"]
Bias = Literal["none", "all", "MiSS_only"]


@dataclass(frozen=True, kw_only=True)
class MissConfig(BiasConfig):
    """MiSS's settings, named as in PEFT: output o gains D[i % r, o] times input i, of D [r, out].

    With `init_weights="mini"` D is [r, mini_r], and repeated over the outputs. https://arxiv.org/abs/2409.15371

    >>> config = MissConfig(r=8, mini_r=2, init_weights="mini", target_modules=["q_proj"])
    >>> config.method("layers.0.q_proj").columns
    2
    """

    peft_type: ClassVar[str] = "MISS"
    bias_of_adapted = "MiSS_only"
    spellings: ClassVar[Mapping[str, Spelling]] = {"miss_block": Spelling("D")}
    neutral: ClassVar[Mapping[str, Any]] = {}

    r: int = 64
    miss_dropout: float = 0.0
    mini_r: int = 1
    init_weights: Init = True
    bias: Bias = "none"  # which biases of the base are trained

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count("r", self.r)
        check_count("mini_r", self.mini_r)
        check_dropout("miss_dropout", self.miss_dropout)
        _check_init(self.init_weights)

    def method(self, name: str) -> "Miss":  # noqa: ARG002  # the same everywhere
        mini = self.init_weights == "mini"
        return Miss(1.0, self.r, self.mini_r if mini else 0, float(self.miss_dropout), self.init_weights is not False)

    def told(self, name: str) -> Mapping[str, float]:  # noqa: ARG002  # the same everywhere
        return {"r": self.r}


def _check_init(value: object) -> None:
    if value == "bat":
        raise ConfigError(
            "init_weights is 'bat', which multiplies each block of the weight by a matrix of its own; it is not "
            "served; merge it in PEFT, or train with True or 'mini'"
        )
    if not isinstance(value, bool) and value != "mini":
        raise ConfigError(f"init_weights is {quoted(value)}; true, false or 'mini' is wanted")


@dataclass(frozen=True)
class Miss(Placed):
    """D is [r, out], or [r, columns] repeated over the outputs; the last block of inputs may be shorter than r."""

    r: int
    columns: int = 0  # 0: one for each output
    dropout: float = 0.0
    zero: bool = True  # does D begin as zeros?

    name = "MiSS"

    def tensors(self, site: Site) -> Mapping[str, Spec]:
        only_linear(site, self.name)
        out_features, in_features = site.shape
        if self.r > in_features:
            raise MatchError(
                f"{printable(site.name)}: r is {self.r}, and it has {in_features} inputs; choose an r of no more, or "
                "exclude it"
            )
        if self.columns and out_features % self.columns:
            raise MatchError(
                f"{printable(site.name)}: mini_r is {self.columns}, of which its {out_features} outputs are no "
                "multiple; choose another, or exclude it"
            )
        return {"D": Spec("miss_block", (self.r, self.columns or out_features))}

    def init(self, site: Site, base: Callable[[], Dense]) -> Params:  # noqa: ARG002  # for others
        shape = self.tensors(site)["D"].shape
        return {"D": torch.zeros(shape) if self.zero else kaiming(shape)}

    def matrices(self, p: Params, site: Site) -> Params:
        """D as [out, r], and for each input the column of it that counts."""
        out_features, in_features = site.shape
        D = p["D"].mT
        D = D.repeat(out_features // len(D), 1) if self.columns else D  # [out, r]
        return {"D": D, "at": torch.arange(in_features, device=D.device) % self.r}

    def numbers(self, p: Params, tile: Tile) -> Tensor:
        rows, columns = tile
        return p["D"][rows].index_select(1, p["at"][columns])

    def branch(self, x: Tensor, run: Run, op: Op, p: Params, training: bool) -> Tensor:
        below, D = run(x), p["D"]
        x = in_dtype_of(D, x)
        if training and self.dropout:
            x = F.dropout(x, self.dropout)
        h = _summed(x, self.r)  # [*batch, r]
        if not self.columns:
            return op.mix_onto(below, h, D.mT, self.scaling)
        moved = op.mix(h, D.mT)  # [*batch, columns]
        times = below.shape[-1] // self.columns
        return onto(below, moved.repeat(*(1 for _ in moved.shape[:-1]), times), self.scaling)


def _summed(x: Tensor, r: int) -> Tensor:
    """The sum of x's blocks of r numbers, [*batch, in] -> [*batch, r]; the last one may be shorter."""
    short = -x.shape[-1] % r
    x = F.pad(x, (0, short)) if short else x
    return x.reshape(*x.shape[:-1], x.shape[-1] // r, r).sum(-2)
