"""Super-Tuning: W + S + s * B A, where S has numbers at the places of W's largest, or smallest; B A may be left out.

https://arxiv.org/abs/2607.09287
"""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from surgery.core.arithmetic import exact_float64
from surgery.core.config import AdapterConfig
from surgery.core.elementwise import Shift
from surgery.core.method import Additive, Dense, Params, Product, Run
from surgery.core.op import Op, Tile, in_dtype_of
from surgery.core.site import Site
from surgery.core.spec import Spec, Spelling
from surgery.errors import ConfigError, MatchError, StateError, ValueRangeError, printable
from surgery.methods.acts_on import only_linear
from surgery.methods.field_values import check_between, check_count, check_dropout, check_number
from surgery.methods.kaiming import kaiming
from surgery.methods.sparse import laid_in, with_sparse
from surgery.methods.spreads import product_spread, unit_of

_MOST = (1 << 31) - 1  # that an index of int32 tells


@dataclass(frozen=True, kw_only=True)
class SupertuningConfig(AdapterConfig):
    """Super-Tuning's settings, named as in PEFT: of a weight [out, in] only 1 - `sparsity` of the numbers are trained.

    They are the largest, or by `select_top=False` the smallest, by magnitude; files hold their flat places as indices.
    With `r` a LoRA of that rank, scaled by lora_alpha / r, is trained besides. https://arxiv.org/abs/2607.09287

    >>> import surgery, torch
    >>> model = torch.nn.Sequential(torch.nn.Linear(16, 8))
    >>> _ = surgery.inject(model, SupertuningConfig(sparsity=0.75, r=2, target_modules=["0"]))
    >>> model[0].supertuning_values["default"].shape, model[0].supertuning_lora_B["default"].weight.shape
    (torch.Size([32]), torch.Size([8, 2]))
    """

    peft_type: ClassVar[str] = "SUPERTUNING"
    spellings: ClassVar[Mapping[str, Spelling]] = {
        "supertuning_values": Spelling("v"),
        "supertuning_indices": Spelling("at", integers=True),
        "supertuning_lora_A.weight": Spelling("A"),
        "supertuning_lora_B.weight": Spelling("B"),
    }
    neutral: ClassVar[Mapping[str, Any]] = {}
    unwritten = frozenset({"exclude_modules", "layers_to_transform", "layers_pattern"})

    sparsity: float = 0.99
    select_top: bool = True
    r: int | None = None
    lora_alpha: float | None = None  # of 2 r, where there is an r
    lora_dropout: float = 0.0
    init_weights: bool = True
    save_precomputed_indices: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_between("sparsity", self.sparsity, 0, 1)
        if self.sparsity == 1:
            raise ConfigError("sparsity is 1, which leaves nothing to train; a number below 1 is wanted")
        check_dropout("lora_dropout", self.lora_dropout)
        if not self.save_precomputed_indices:
            raise ConfigError(
                "save_precomputed_indices is false, and such files lack the places of their numbers, which come of the "
                "base, and among equal ones by chance; load it in PEFT, and save it there with true"
            )
        if self.r is not None:
            check_count("r", self.r)
            if self.lora_alpha is None:
                object.__setattr__(self, "lora_alpha", 2 * self.r)
        if self.lora_alpha is not None:
            check_number("lora_alpha", self.lora_alpha)
            if self.r is None:
                raise ConfigError(
                    f"lora_alpha is {self.lora_alpha}, and r is null; give the rank r of a LoRA, or no alpha"
                )

    def told(self, name: str) -> Mapping[str, float]:  # noqa: ARG002  # the same everywhere
        return {} if self.r is None or self.lora_alpha is None else {"r": self.r, "lora_alpha": self.lora_alpha}

    def endings(self) -> Mapping[str, Spelling]:
        return {ending: one for ending, one in self.spellings.items() if one.role in {"v", "at"} or self.r is not None}

    def forms(self) -> Collection[frozenset[str]]:
        return [frozenset(one.role for one in self.endings().values())]

    def method(self, name: str) -> "Supertuning":  # noqa: ARG002  # the same everywhere
        r, alpha = self.r or 0, 0.0 if self.lora_alpha is None else self.lora_alpha
        ratio = alpha / r if r else 0.0
        return Supertuning(1.0, self.sparsity, self.select_top, r, ratio, self.lora_dropout, self.init_weights)


@dataclass(frozen=True)
class Supertuning(Additive):
    """v is [numbers], and `at` [numbers] their flat places; A [r, in] and B [out, r] are LoRA's, if r is not 0."""

    sparsity: float
    largest: bool
    r: int
    ratio: float  # by which B A is scaled
    dropout: float = 0.0
    zero: bool = True  # does it begin without effect?

    name = "Super-Tuning"

    def tensors(self, site: Site) -> Mapping[str, Spec]:
        only_linear(site, self.name)
        out_features, in_features = site.shape
        whole = out_features * in_features
        count = int(whole * (1 - self.sparsity))
        if count < 1 or whole > _MOST:
            why = (
                f"of a sparsity of {self.sparsity} nothing is left to train" if count < 1 else "no index tells of them"
            )
            raise MatchError(f"{printable(site.name)}: its weight has {whole} numbers; {why}; exclude it")
        found = {
            "v": Spec("supertuning_values", (count,)),
            "at": Spec("supertuning_indices", (count,), fixed=True),
        }
        if self.r:
            found["A"] = Spec("supertuning_lora_A.weight", (self.r, in_features))
            found["B"] = Spec("supertuning_lora_B.weight", (out_features, self.r))
        return found

    def settings(self) -> Mapping[str, str]:
        return {**super().settings(), **({"lora": self.ratio.hex()} if self.r else {})}

    def init(self, site: Site, base: Callable[[], Dense]) -> Params:
        shapes = {role: spec.shape for role, spec in self.tensors(site).items()}
        weight = base().weight.detach()
        if weight.is_meta:
            raise StateError(
                f"{printable(site.name)}: it is on the meta device, and Super-Tuning chooses among its numbers; give "
                "the model its weights first"
            )
        chosen = weight.abs().flatten().topk(shapes["v"][0], largest=self.largest).indices
        v = torch.zeros(shapes["v"]) if self.zero else torch.randn(shapes["v"])
        fresh = {"v": v, "at": chosen.to("cpu", torch.int32)}
        if self.r:
            B = torch.zeros(shapes["B"]) if self.zero else kaiming(shapes["B"])
            fresh |= {"A": kaiming(shapes["A"]), "B": B}
        return fresh

    def check_values(self, p: Params, site: Site, where: str) -> None:
        at, whole = p["at"], site.shape[0] * site.shape[1]
        if int(at.min()) < 0 or int(at.max()) >= whole:
            why = f"indices beyond a weight of {whole} numbers"
        elif len(torch.unique(at)) < len(at):
            why = "an index twice"
        else:
            return
        raise ValueRangeError(
            f"{printable(where)}: {printable(site.name)}: supertuning_indices holds {why}; each place once is wanted; "
            "save or download it again"
        )

    def matrices(self, p: Params, site: Site) -> Params:
        """The frame, [out, in, 0], has the weight's shape, and no numbers."""
        flat, width = p["at"].to(torch.int64), site.shape[1]
        return {**p, "rows": flat // width, "columns": flat % width, "frame": p["v"].new_empty(*site.shape, 0)}

    def delta(self, p: Params, tile: Tile, product: Product) -> Tensor:
        S, low_rank = self._parts(p, tile, product)
        return S if low_rank is None else S + low_rank

    def steps(self, p: Params, tile: Tile, product: Product) -> Shift:
        S, low_rank = self._parts(p, tile, product)
        # A plain merge adds one and then the other: four times the two cover what it rounds of them, and of their sum.
        return Shift(S) if low_rank is None else Shift(S + low_rank, 4 * (S.abs() + low_rank.abs()))

    def _parts(self, p: Params, tile: Tile, product: Product) -> tuple[Tensor, Tensor | None]:
        S = laid_in(tile, product.held(p["v"], "v"), p["rows"], p["columns"], p["frame"].shape[:2])
        S = S if self.scaling == 1 else S * self.scaling
        return S, product(p["B"], p["A"], tile, self.scaling * self.ratio) if self.r else None

    def spread(self, p: Params, tile: Tile) -> Tensor:
        # Of the numbers the scaling alone rounds, if there is one; the product is LoRA's.
        S = laid_in(tile, exact_float64(p["v"]), p["rows"], p["columns"], p["frame"].shape[:2])
        apart = unit_of(p["v"]) * abs(self.scaling) * S.abs()
        if not self.r:
            return apart
        A, B = exact_float64(p["A"][:, tile[1]]), exact_float64(p["B"][tile[0]])
        return apart + abs(self.scaling * self.ratio) * product_spread(B, A, unit_of(p["A"], p["B"]))

    def spread_over(self, base: Tensor, outcome: Tensor, p: Params, tile: Tile, dtype: torch.dtype) -> Tensor:  # noqa: ARG002  # as others'
        # The sum of both, rounded once more than the outcome where both parts are.
        if not self.r:
            return self.spread(p, tile)
        there = torch.ones(len(p["rows"]), dtype=torch.float64, device=p["v"].device)
        both = laid_in(tile, there, p["rows"], p["columns"], p["frame"].shape[:2])
        return self.spread(p, tile) + torch.finfo(dtype).eps / 2 * both * base.abs()

    def branch(self, x: Tensor, run: Run, op: Op, p: Params, training: bool) -> Tensor:
        v = p["v"] if self.scaling == 1 else p["v"] * self.scaling
        out = with_sparse(x, run, lambda _: (v, p["at"].to(torch.int64)))
        if not self.r:
            return out
        x = in_dtype_of(p["A"], x)
        x = F.dropout(x, self.dropout) if training and self.dropout else x
        return op.mix_onto(out, op.apply(x, p["A"]), p["B"], self.scaling * self.ratio)
