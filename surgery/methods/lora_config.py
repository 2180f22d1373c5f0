"""LoraConfig: LoRA's settings, and the method that they mean at a site."""

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Self

from surgery.core.field_checks import check_names
from surgery.core.method import Params
from surgery.core.names import suffix_hits
from surgery.core.select import pattern_value
from surgery.core.site import Site
from surgery.core.spec import Spelling
from surgery.core.starter import Held, Starter
from surgery.errors import ConfigError, printable
from surgery.methods.bd_lora import BdLora, blocks_of, check_blocks
from surgery.methods.bias_config import BiasConfig
from surgery.methods.dora import Dora
from surgery.methods.eva import Eva, is_settled, patterns_of
from surgery.methods.field_values import (
    check_count,
    check_counts,
    check_dropout,
    check_number,
    check_numbers,
)
from surgery.methods.inits import CONVERSION, FromBase, check_init, doubled, is_from_base, joined
from surgery.methods.lora import OUT_PROJ, Init, Lora
from surgery.methods.lora_bias import LoraBias
from surgery.methods.lora_clashes import check_together
from surgery.methods.lora_fields import (
    NEUTRAL,
    REASONS,
    Bias,
    Ranges,
    TokenIndices,
    check_ranges,
    check_tokens,
    layers_of,
    tokens_of,
)
from surgery.methods.qa_lora import QaLora, check_group
from surgery.methods.starters import check_settings, check_used, starter_of
from surgery.methods.token_rows import TokenRows


@dataclass(frozen=True, kw_only=True)
class LoraConfig(BiasConfig):
    """LoRA's settings, named as in PEFT: W + scaling * B A, of A [r, in] and B [out, r].

    The scaling is lora_alpha / r, or with `use_rslora` lora_alpha / sqrt(r). docs/adapters.md tells of each field.
    https://arxiv.org/abs/2106.09685

    >>> LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj"]).method("layers.0.q_proj").scaling
    2.0
    """

    peft_type: ClassVar[str] = "LORA"
    bias_of_adapted = "lora_only"
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
    loftq_config: Mapping[str, Any] | None = field(default_factory=dict)  # PEFT's LoftQConfig, for "loftq"
    eva_config: Mapping[str, Any] | None = None  # PEFT's EvaConfig, for init_lora_weights "eva"
    corda_config: Mapping[str, Any] | None = None  # PEFT's CordaConfig, for "corda"
    lora_ga_config: Mapping[str, Any] | None = None  # PEFT's LoraGAConfig, for "lora_ga"
    use_qalora: bool = False  # A sees the means of groups of inputs
    qalora_group_size: int = 16
    layer_replication: Ranges = None  # the model's layers, stacked anew beneath the adapter
    ensure_weight_tying: bool = False  # copies of modules_to_save that are tied stay so
    trainable_token_indices: TokenIndices = None  # rows of the embedding, or by module

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count("r", self.r)
        check_number("lora_alpha", self.lora_alpha)
        check_dropout("lora_dropout", self.lora_dropout)
        check_init(self.init_lora_weights)
        check_blocks(self.use_bdlora)
        check_group(self.qalora_group_size)
        check_ranges(self.layer_replication)
        check_tokens(self.trainable_token_indices)
        check_settings(self)
        check_names("target_parameters", self.target_parameters, or_pattern=False)
        check_counts("rank_pattern", self.rank_pattern)
        check_numbers("alpha_pattern", self.alpha_pattern)
        check_together(self)

    def check_fresh(self) -> None:
        check_used(self, self.init_lora_weights)

    def starter(self, site: Site, held: Held) -> Starter | None:
        return starter_of(self, self.init_lora_weights, site, self._numbers(site.name)[0], held)

    def settled(self, observers: Mapping[str, Any]) -> bool:
        return is_settled(observers)

    def after(self, observers: Mapping[str, Any]) -> tuple[Self, Collection[str]]:
        if self.init_lora_weights != Eva.start:
            return super().after(observers)
        kept = {name: one for name, one in observers.items() if one.rank}
        return replace(self, **patterns_of(kept, {name: self._numbers(name)[1] for name in kept})), kept.keys()

    def check_whole(self) -> None:
        if self.init_lora_weights == "loftq":
            raise ConfigError(
                "init_lora_weights is 'loftq', by which PEFT changes the base whenever it reads this, to what no LoRA "
                "over the unchanged one holds; merge it in PEFT, into the base that it was trained over"
            )
        if self._from_base:
            raise ConfigError(
                f"init_lora_weights is {self.init_lora_weights!r}, by which PEFT changes the base whenever it reads "
                "this; what it began as is not in the file; convert the adapter in PEFT, by save_pretrained with "
                f"{CONVERSION}"
            )

    def written(self, sites: Mapping[str, Params]) -> tuple[Self, Mapping[str, Params]]:
        """Of a start that is a part of the base, the ordinary LoRA of what has changed since."""
        if not self._from_base:
            return self, sites
        r, alpha = self._doubled(self.r, self.lora_alpha)
        told = replace(
            self,
            init_lora_weights=True,
            loftq_config={},
            corda_config=None,
            lora_ga_config=None,
            r=r,
            lora_alpha=alpha,
            rank_pattern={name: self._doubled(one, 0)[0] for name, one in self.rank_pattern.items()},
            alpha_pattern={name: self._doubled(0, one)[1] for name, one in self.alpha_pattern.items()},
        )
        return told, {name: joined(p) for name, p in sites.items()}

    @property
    def _from_base(self) -> bool:
        return is_from_base(self.init_lora_weights)

    def _doubled(self, r: int, alpha: float) -> tuple[int, float]:
        return doubled(r, alpha, self.use_rslora)

    def endings(self) -> Mapping[str, Spelling]:
        wanted = {"m": self.use_dora, "b": self.lora_bias, "t": bool(self.trainable_token_indices)}
        absent = {role for role, asked in wanted.items() if not asked}
        return {ending: one for ending, one in self.spellings.items() if one.role not in absent}

    def told(self, name: str) -> Mapping[str, float]:
        return dict(zip(("r", "lora_alpha"), self._numbers(name), strict=True))

    def parameters(self) -> Sequence[str]:
        return self.target_parameters or ()

    def with_parameters(self, names: Sequence[str]) -> Self:
        return replace(self, target_parameters=names or None)

    def stacking(self) -> tuple[int, ...]:
        return layers_of(self.layer_replication)

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

    def method(self, name: str) -> "Lora | LoraBias | Dora | BdLora | QaLora | FromBase | TokenRows":
        tokens = tokens_of(self.trainable_token_indices, name)
        if tokens is not None:
            return TokenRows(tuple(tokens))
        r, alpha = self._numbers(name)
        if self._from_base:
            r, alpha = self._doubled(r, alpha)
        lora = Lora(
            r=r,
            scaling=alpha / math.sqrt(r) if self.use_rslora else alpha / r,
            dropout=0.0 if self.use_dora else self.lora_dropout,
            start=True if self._from_base or self.init_lora_weights == Eva.start else self.init_lora_weights,
            halves=name.endswith(OUT_PROJ),
        )
        if self.use_dora:
            return Dora(lora, self.lora_dropout)
        if self._from_base:
            return FromBase(lora.scaling, lora, str(self.init_lora_weights))
        blocks = blocks_of(self.use_bdlora, name) if self.use_bdlora else None
        if blocks is not None:
            return BdLora(lora, blocks)
        if self.use_qalora:
            return QaLora(lora, self.qalora_group_size)
        return LoraBias(lora) if self.lora_bias else lora

    def _numbers(self, name: str) -> tuple[int, float]:
        """r and alpha of a site."""
        alpha = pattern_value(self.alpha_pattern, name, float(self.lora_alpha))
        return pattern_value(self.rank_pattern, name, self.r), alpha
