"""LoRA: W + scaling * B A, with scaling = alpha / r, or alpha / sqrt(r). https://arxiv.org/abs/2106.09685"""

import math
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from types import MappingProxyType
from typing import Any, ClassVar, Literal, Self

import torch
from torch import Tensor
from torch.nn import functional as F

from surgery.core.arithmetic import exact_float64
from surgery.core.as_peft import AsPeft
from surgery.core.config import AdapterConfig, Spelling, check_names
from surgery.core.method import Additive, Dense, Params, Product, Run, Spec
from surgery.core.names import suffix_hits
from surgery.core.op import FEW, Factors, Op, Tile
from surgery.core.patterns import PatternTable
from surgery.core.select import pattern_value
from surgery.core.site import Site
from surgery.errors import ConfigError, MatchError, printable
from surgery.methods import stacks
from surgery.methods.bd_lora import BdLora, blocks_of, check_blocks
from surgery.methods.dora import Dora
from surgery.methods.lora_as_peft import delta_as_peft, rounds_first
from surgery.methods.lora_bias import LoraBias
from surgery.methods.lora_fields import NEUTRAL, REASONS, Bias, TokenIndices, check_bias, check_tokens, tokens_of
from surgery.methods.token_rows import TokenRows

_LARGEST = sys.float_info.max  # NaN compares false to it, and a whole number of any length can be compared

OUT_PROJ = ".base_layer.out_proj"
"""How PEFT spells the out_proj of an adapted nn.MultiheadAttention, whose delta it adds twice."""

Init = bool | Literal["gaussian", "orthogonal"]


@dataclass(frozen=True, kw_only=True)
class LoraConfig(AdapterConfig):
    """LoRA's settings, named as in PEFT.

    >>> LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj"]).method("layers.0.q_proj").scaling
    2.0
    """

    peft_type: ClassVar[str] = "LORA"
    spellings: ClassVar[Mapping[str, Spelling]] = {
        "lora_A.weight": Spelling("A"),
        "lora_B.weight": Spelling("B"),
        "lora_embedding_A": Spelling("A", "embedding"),
        "lora_embedding_B": Spelling("B", "embedding"),
        "lora_B.bias": Spelling("b"),
        "lora_magnitude_vector.weight": Spelling("m"),  # as it is called in PEFT's models, and so in some files
        "lora_magnitude_vector": Spelling("m"),
        "token_adapter.trainable_tokens_delta": Spelling("t", "embedding", alone=True),
    }
    neutral: ClassVar[Mapping[str, Any]] = NEUTRAL
    reasons: ClassVar[Mapping[str, str]] = REASONS

    r: int = 8
    lora_alpha: float = 8
    lora_dropout: float = 0.0
    use_rslora: bool = False
    use_dora: bool = False
    lora_bias: bool = False  # B has a bias, which is added to the layer's
    fan_in_fan_out: bool = False  # read and written for PEFT; the op decides, see hosts
    init_lora_weights: Init = True
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    bias: Bias = "none"  # which biases of the base are trained
    target_parameters: Sequence[str] | None = None  # parameters of any module, such as experts.gate_up_proj
    use_bdlora: Mapping[str, Any] | None = None  # PEFT's BdLoraConfig: which factors are block-diagonal
    ensure_weight_tying: bool = False  # copies of modules_to_save that are tied stay so
    trainable_token_indices: TokenIndices = None  # rows of the embedding, or by module

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_rank("r", self.r)
        check_bias(self.bias)
        check_blocks(self.use_bdlora)
        if self.use_bdlora and (
            self.use_dora or self.lora_bias or self.target_parameters or self.init_lora_weights not in (True, False)
        ):
            raise ConfigError(
                "use_bdlora is given; as in PEFT it goes without use_dora, lora_bias and target_parameters, and with "
                "init_lora_weights True or False"
            )
        check_tokens(self.trainable_token_indices)
        _check_number("lora_alpha", self.lora_alpha)
        _check_number("lora_dropout", self.lora_dropout)
        if not 0 <= self.lora_dropout < 1:
            raise ConfigError(f"lora_dropout is {self.lora_dropout}; it must be at least 0 and below 1")
        if self.init_lora_weights not in (True, False, "gaussian", "orthogonal"):
            raise ConfigError(
                f"init_lora_weights is {printable(self.init_lora_weights)!r}; True, False, 'gaussian' and "
                "'orthogonal', which leave the base alone, are supported; start with one of them, or convert the "
                "adapter in PEFT first, by path_initial_model_for_weight_conversion"
            )
        if self.lora_bias and (self.use_dora or self.init_lora_weights not in (True, False)):
            raise ConfigError(
                "lora_bias is true; as in PEFT it goes with init_lora_weights True or False, without DoRA"
            )
        check_names("target_parameters", self.target_parameters, or_pattern=False)
        if self.target_parameters and (self.use_dora or self.lora_bias or self.lora_dropout):
            raise ConfigError(
                "target_parameters is given; as in PEFT it goes without use_dora, lora_bias and lora_dropout"
            )
        if self.target_parameters and self.bias != "none":
            raise ConfigError("target_parameters is given; it goes with bias 'none' alone; set one of the two")
        for key, rank in self.rank_pattern.items():
            _check_rank(f"rank_pattern[{printable(key)!r}]", rank)
        for key, alpha in self.alpha_pattern.items():
            _check_number(f"alpha_pattern[{printable(key)!r}]", alpha)

    def unused(self, names: Collection[str]) -> Mapping[str, Sequence[str]]:
        tables = {"rank_pattern": self.rank_pattern, "alpha_pattern": self.alpha_pattern}
        return {field: table.unused(names) for field, table in tables.items() if isinstance(table, PatternTable)}

    def endings(self) -> Mapping[str, Spelling]:
        wanted = {"m": self.use_dora, "b": self.lora_bias, "t": bool(self.trainable_token_indices)}
        absent = {role for role, asked in wanted.items() if not asked}
        return {ending: one for ending, one in self.spellings.items() if one.role not in absent}

    def told(self, name: str) -> Mapping[str, float]:
        return dict(zip(("r", "lora_alpha"), self._numbers(name), strict=True))

    def biases(self) -> str:
        return self.bias

    def parameters(self) -> Sequence[str]:
        return self.target_parameters or ()

    def with_parameters(self, names: Sequence[str]) -> Self:
        return replace(self, target_parameters=names or None)

    def ties(self) -> bool:
        return self.ensure_weight_tying

    def rows(self) -> Collection[str] | None:
        tokens = self.trainable_token_indices
        return tuple(tokens) if isinstance(tokens, Mapping) else None if tokens else ()

    def with_rows(self, names: Collection[str]) -> Self:
        tokens, table = self.trainable_token_indices, {}
        for name in names:
            found = tokens_of(tokens, name) if isinstance(tokens, Mapping) else tokens
            if found is None:
                raise ConfigError(f"trainable_token_indices tells no tokens of {printable(name)}; add its entry")
            table[name] = found
        for entry in self.rows() or ():
            if isinstance(tokens, Mapping) and not any(suffix_hits((entry,), name) for name in names):
                if tokens[entry] not in table.values():
                    raise ConfigError(f"the rows of {printable(entry)} are not there; the file is incomplete")
                table[entry] = tokens[entry]  # tied to another, which has the same
        return replace(self, trainable_token_indices=table) if table else self

    def named(self, names: Sequence[str]) -> Self:
        return super().named([name for name in names if tokens_of(self.trainable_token_indices, name) is None])

    def method(self, name: str) -> "Lora | LoraBias | Dora | BdLora | TokenRows":
        tokens = tokens_of(self.trainable_token_indices, name)
        if tokens is not None:
            return TokenRows(tuple(tokens))
        r, alpha = self._numbers(name)
        lora = Lora(
            r=r,
            scaling=alpha / math.sqrt(r) if self.use_rslora else alpha / r,
            dropout=0.0 if self.use_dora else self.lora_dropout,
            start=self.init_lora_weights,
            halves=name.endswith(OUT_PROJ),
        )
        if self.use_dora:
            return Dora(lora, self.lora_dropout)
        blocks = blocks_of(self.use_bdlora, name) if self.use_bdlora else None
        if blocks is not None:
            return BdLora(lora, blocks)
        return LoraBias(lora) if self.lora_bias else lora

    def _numbers(self, name: str) -> tuple[int, float]:
        """r and alpha of a site."""
        alpha = pattern_value(self.alpha_pattern, name, float(self.lora_alpha))
        return pattern_value(self.rank_pattern, name, self.r), alpha


@dataclass(frozen=True)
class Lora(Additive, AsPeft):
    """A is [r, in], B is [out, r].

    Over a convolution, as PEFT has it, A is a convolution of the whole input, [r, channels, *kernel], and B mixes
    in each place, [out, r / groups, 1, ...].
    """

    r: int
    dropout: float = 0.0
    start: Init = True
    halves: bool = False  # PEFT adds half of its delta, twice: see OUT_PROJ

    def tensors(self, site: Site) -> Mapping[str, Spec]:
        op = site.acting
        if op.stack:
            return {role: Spec(f"lora_{role}.weight", shape) for role, shape in stacks.shapes(site, self.r).items()}
        if self.r % op.groups:
            raise MatchError(
                f"{printable(site.name)}: a convolution in {op.groups} groups, which r = {self.r} is no multiple of, "
                "as PEFT asks; choose another r (rank_pattern), or exclude it"
            )
        out_features, in_features = site.shape
        return _specs(op.name, op.kernel, (self.r, op.channels(in_features)), (out_features, self.r // op.groups))

    def matrices(self, p: Params, site: Site) -> Params:
        if site.acting.stack:
            return stacks.by_expert(p, site.acting)
        return {role: _as_matrix(values) for role, values in p.items()}

    def refuse_merge(self, site: Site) -> None:
        if site.acting.groups > 1:
            raise MatchError(
                f"{printable(site.name)}: a convolution in groups, each of which sees a part of the channels, while "
                "this LoRA makes each output depend on all of them; no weight of this shape holds that; "
                "leave it unmerged, or exclude it"
            )

    def init(self, site: Site, base: Callable[[], Dense]) -> Params:  # noqa: ARG002  # for others
        self._check_start(site)
        A, B = (torch.zeros(spec.shape) for spec in self.tensors(site).values())
        if self.start == "orthogonal":
            return _orthogonal(A, B)
        if site.acting.name == "embedding":  # as PEFT: an embedding's A is zero and its B is not
            B.normal_()
            if self.start is False:
                A.normal_()
        elif self.start == "gaussian":
            A.normal_(std=1 / self.r)
        else:
            _kaiming(A)
            if self.start is False:
                _kaiming(B)
        return {"A": A, "B": B}

    def delta(self, p: Params, tile: Tile, product: Product) -> Tensor:
        return stacks.delta(p, tile, product) if p["A"].dim() > 2 else product(p["B"], p["A"], tile)

    def directions(self, p: Params) -> Tensor | None:
        return p["A"] if p["A"].dim() == 2 else None

    def merge_as_peft(self, stored: Tensor, p: Params, site: Site, safe: bool) -> Tensor:
        delta = delta_as_peft(p, site.acting, self.scaling / 2 if self.halves else self.scaling)
        rounded = delta.to(stored.dtype)
        if self.halves:  # the attention layer adds it, then its out_proj once more, which is never told to be safe
            return (stored + rounded + delta).to(stored.dtype)
        return (stored + (rounded if safe or rounds_first(site.acting) else delta)).to(stored.dtype)

    def spread(self, p: Params, tile: Tile) -> Tensor:
        if p["A"].dim() > 2:
            each = stacks.parts(tile, p["B"].shape[1])
            return torch.cat([self.spread({role: p[role][one] for role in "AB"}, part) for one, part in each])
        # The grid's bound (see arithmetic), and that of a sum of r products with each operation rounded.
        A, B = exact_float64(p["A"][:, tile[1]]).abs(), exact_float64(p["B"][tile[0]]).abs()
        unit = max(torch.finfo(p[role].dtype).eps / 2 for role in "AB")
        grid = self.r * 2.0**-21 * B.amax(1, keepdim=True) * A.amax(0, keepdim=True)  # [out, in]
        return abs(self.scaling) * (grid + (self.r + 1) * unit * (B @ A))

    def _check_start(self, site: Site) -> None:
        """ConfigError for settings that would not begin, or train, as they say at this site."""
        if self.dropout and site.acting.roles:
            raise ConfigError(
                f"{printable(site.name)}: lora_dropout is {self.dropout}, and weights that a module reads by itself "
                "have no input that it could act on; set it to 0"
            )
        if self.start == "orthogonal" and site.acting.stack:
            raise ConfigError(
                f"{printable(site.name)}: the orthogonal init is of one matrix, and this is a stack of them; start "
                "with True or 'gaussian'"
            )

    def branch(self, x: Tensor, run: Run, op: Op, p: Params, training: bool) -> Tensor:
        A, B = p["A"], p["B"]
        if x.numel() >= FEW and not (training and self.dropout):
            plain = run.plain()
            out = None if plain is None else op.apply_with(x, *plain, Factors(A, B, self.scaling))
            if out is not None:
                return out
        below = run(x)
        if op.kernel:
            A, B = A.flatten(1), B.flatten(1)  # [r, channels * kernel], [out, r / groups]
        if op.accepts_dropout():
            if x.dtype != A.dtype and not torch.is_autocast_enabled(x.device.type):
                x = x.to(A.dtype)
            if training and self.dropout:
                x = F.dropout(x, self.dropout)
        return op.mix_onto(below, op.apply(x, A), B, self.scaling)


@lru_cache
def _specs(op: str, kernel: tuple[int, ...], a: tuple[int, int], b: tuple[int, int]) -> Mapping[str, Spec]:
    """Of A and B, whose first two axes are `a` and `b`. Kept: a model has thousands of sites of few shapes."""
    prefix, suffix = ("lora_embedding_", "") if op == "embedding" else ("lora_", ".weight")
    found = {
        "A": Spec(f"{prefix}A{suffix}", (*a, *kernel)),
        "B": Spec(f"{prefix}B{suffix}", (*b, *(1 for _ in kernel))),
    }
    return MappingProxyType(found)


def _as_matrix(values: Tensor) -> Tensor:
    """A factor of a convolution, [rows, channels, *kernel], as [rows, in]."""
    return values.flatten(1) if values.dim() > 2 else values


def _kaiming(values: Tensor) -> None:
    """Kaiming's uniform start, with a = sqrt(5): by how many numbers each output is made of."""
    bound = _as_matrix(values).shape[1] ** -0.5
    values.uniform_(-bound, bound)


def _orthogonal(A: Tensor, B: Tensor) -> Params:
    """Of the shapes of A and B, random, with B A = 0: their inner rows come from disjoint halves of one rotation."""
    r, mixed = A.shape[0], B.shape[1]
    if r % 2 or mixed != r:
        wanted = "an even r" if mixed == r else "a convolution in one group"
        raise ConfigError(f"r is {r}; the orthogonal init needs {wanted}")
    rotation = torch.linalg.qr(torch.randn(r, r)).Q
    first = rotation[0::2].T @ torch.randn(r // 2, _as_matrix(A).shape[1]) / 10  # [r, in]
    second = torch.randn(B.shape[0], r // 2) @ rotation[1::2] / 10  # [out, r]
    return {"A": first.view(A.shape), "B": second.view(B.shape)}


def _check_rank(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value < 1 << 31:
        raise ConfigError(f"{name} is {printable(value)!r}; it must be a whole number, from 1 to 2^31 - 1")


def _check_number(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) <= _LARGEST:
        raise ConfigError(f"{name} is {printable(value)!r}; it must be a finite number")
