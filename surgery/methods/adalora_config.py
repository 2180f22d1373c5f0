"""AdaLoraConfig: AdaLoRA's settings and schedule, and the masks of the triplets that are left at each site."""

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from surgery.core.method import Params
from surgery.core.spec import Spelling
from surgery.errors import ConfigError, printable, quoted
from surgery.methods.adalora import BESIDE_RANK, AdaLora
from surgery.methods.bias_config import BiasConfig
from surgery.methods.field_values import check_count
from surgery.methods.lora_fields import NEUTRAL, REASONS, Bias

_COUNTS: Mapping[str, int] = {"r": 0, "init_r": 1, "target_r": 1, "tinit": 0, "tfinal": 0, "deltaT": 1, "total_step": 1}
_LARGEST = sys.float_info.max
_NUMBERS: Mapping[str, tuple[Callable[[float], bool], str]] = {
    "lora_alpha": (lambda value: 0 < value <= _LARGEST, "above 0"),
    "lora_dropout": (lambda value: 0 <= value < 1, "at least 0 and below 1"),
    "orth_reg_weight": (lambda value: 0 <= value <= _LARGEST, "at least 0"),
    "beta1": (lambda value: 0 < value < 1, "above 0 and below 1"),
    "beta2": (lambda value: 0 < value < 1, "above 0 and below 1"),
}

# Of LoRA's fields, which PEFT writes for AdaLoRA too, those that mean nothing here, besides those that LoRA refuses.
_NEUTRAL = {
    **NEUTRAL,
    "alpha_pattern": {},
    "corda_config": None,
    "ensure_weight_tying": False,
    "eva_config": None,
    "layer_replication": None,
    "loftq_config": {},
    "lora_ga_config": None,
    "target_parameters": None,
    "trainable_token_indices": None,
    "lora_bias": False,
    "qalora_group_size": 16,
    "use_bdlora": None,
    "use_dora": False,
    "use_qalora": False,
    "use_rslora": False,
}


@dataclass(frozen=True, kw_only=True)
class AdaLoraConfig(BiasConfig):
    """AdaLoRA's settings, named as in PEFT: W + scaling * B (E * A), of A [r, in], E [r, 1] and B [out, r].

    Up to step `tinit` all ranks are `init_r`; at step `total_step - tfinal` they are `target_r` on average; in
    between they are allotted anew every `deltaT` steps. `rank_pattern` tells by `<module>.lora_E` which of the
    `init_r` triplets are left. `adalora_step` allots them. https://arxiv.org/abs/2303.10512

    >>> config = AdaLoraConfig(init_r=4, rank_pattern={"q_proj.lora_E": [True, False, False, True]})
    >>> config.method("q_proj").r, config.method("v_proj").r
    (2, 4)
    """

    peft_type: ClassVar[str] = "ADALORA"
    bias_of_adapted = "lora_only"
    spellings: ClassVar[Mapping[str, Spelling]] = {f"lora_{role}": Spelling(role) for role in "AEB"}
    neutral: ClassVar[Mapping[str, Any]] = _NEUTRAL
    reasons: ClassVar[Mapping[str, str]] = REASONS

    r: int = 8  # PEFT's, which nothing reads: the rank is init_r
    init_r: int = 12
    target_r: int = 8
    lora_alpha: float = 8
    lora_dropout: float = 0.0
    fan_in_fan_out: bool = False  # read and written for PEFT; the op decides, see hosts
    init_lora_weights: bool = True
    bias: Bias = "none"  # which biases of the base are trained
    tinit: int = 0
    tfinal: int = 0
    deltaT: int = 1  # noqa: N815  # PEFT's spelling
    beta1: float = 0.85
    beta2: float = 0.85
    orth_reg_weight: float = 0.5
    total_step: int | None = None
    rank_pattern: Mapping[str, list[bool]] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        for field, lowest in _COUNTS.items():
            if field != "total_step" or self.total_step is not None:
                check_count(field, getattr(self, field), lowest)
        for field in _NUMBERS:
            _check_number(field, getattr(self, field))

    def told(self, name: str) -> Mapping[str, float]:
        return {"r": self.method(name).r, "lora_alpha": self.lora_alpha}

    def method(self, name: str) -> AdaLora:
        mask = self.mask(name)
        rank = self.init_r if mask is None else sum(mask)
        alpha = float(self.lora_alpha)
        scaling = alpha / (self.init_r + BESIDE_RANK)
        return AdaLora(scaling, rank, alpha, self.init_r, dropout=self.lora_dropout, zero=self.init_lora_weights)

    def check_fresh(self) -> None:
        if self.r != type(self).r:
            raise ConfigError(f"r is {self.r}; the rank of AdaLoRA is init_r, and r means nothing; give init_r instead")
        self.check_schedule()

    def check_schedule(self) -> None:
        """ConfigError unless ranks can be allotted by it."""
        if self.total_step is None:
            raise ConfigError("total_step is not given; AdaLoRA is trained for a number of steps that is told before")
        if self.tinit >= self.total_step - self.tfinal:
            raise ConfigError(
                f"tinit is {self.tinit} and total_step - tfinal is {self.total_step - self.tfinal}; ranks are allotted "
                "between the two, so tinit must be smaller"
            )
        if self.target_r > self.init_r:
            raise ConfigError(f"target_r is {self.target_r}, above init_r, {self.init_r}; ranks only ever fall")

    @property
    def end(self) -> int:
        """The step at which ranks are allotted for the last time."""
        assert self.total_step is not None
        return self.total_step - self.tfinal

    def mask(self, name: str) -> list[bool] | None:
        """Which of the triplets of a site are left; None where nothing is known of it."""
        return None if self.rank_pattern is None else self.rank_pattern.get(f"{name}.lora_E")

    def written(self, sites: Mapping[str, Params]) -> tuple[Self, Mapping[str, Params]]:
        """Triplets that the masks let go are left out, but for one that has grown again since: it still counts."""
        if self.rank_pattern is None:
            return self, sites
        masks = {name: self._mask_of(name, p["E"]) for name, p in sites.items()}
        told = replace(self, rank_pattern={f"{name}.lora_E": mask for name, mask in masks.items()})
        return told, {name: _left(p, masks[name]) for name, p in sites.items()}

    def _mask_of(self, name: str, E: Tensor) -> list[bool]:
        """Over `init_r` triplets; where some are gone already, any mask of as many that are left says the same."""
        mask, rank = self.mask(name), len(E)
        if mask is not None and rank == len(mask):
            return [left or grown for left, grown in zip(mask, (E != 0).flatten().tolist(), strict=True)]
        if mask is not None and rank == sum(mask):
            return mask
        return [at < rank for at in range(self.init_r)]

    def _take_patterns(self) -> None:
        """Its one table is of names and masks, not of patterns."""
        if self.rank_pattern is not None:
            for name, mask in _items(self.rank_pattern):
                _check_mask(name, mask, self.init_r)


def _left(p: Params, mask: list[bool]) -> Params:
    """The tensors without the triplets that are gone."""
    if len(p["E"]) == sum(mask):
        return p
    chosen = torch.tensor(mask).nonzero().flatten().to(p["E"].device)
    return {role: values.index_select(1 if role == "B" else 0, chosen) for role, values in p.items()}


def _items(masks: object) -> Any:
    if not isinstance(masks, Mapping):
        raise ConfigError(f"rank_pattern is {quoted(masks)}; it must be a table of masks, or nothing")
    return masks.items()


def _check_mask(name: object, mask: object, init_r: int) -> None:
    if not isinstance(name, str) or not isinstance(mask, list) or len(mask) != init_r or {*map(type, mask)} - {bool}:
        raise ConfigError(
            f"rank_pattern[{quoted(name)}] is {printable(mask)}; it must be a list of init_r, "
            f"{printable(init_r)}, times true or false"
        )


def _check_number(field: str, value: object) -> None:
    fits, wanted = _NUMBERS[field]
    if isinstance(value, bool) or not isinstance(value, int | float) or not fits(value):
        raise ConfigError(f"{field} is {quoted(value)}; it must be a finite number {wanted}")
