"""DeloraConfig: DeLoRA's settings, and the method that they mean at a site."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from surgery.core.select import pattern_value
from surgery.core.spec import Spelling
from surgery.methods.bias_config import BiasConfig
from surgery.methods.delora import Delora
from surgery.methods.field_values import (
    check_count,
    check_counts,
    check_dropout,
    check_number,
    check_numbers,
)

Bias = Literal["none", "all", "delora_only"]


@dataclass(frozen=True, kw_only=True)
class DeloraConfig(BiasConfig):
    """DeLoRA's settings, named as in PEFT: W + B D A * w, of A [r, in], B [out, r] and D = lambda / r / (|A_i| |B_i|).

    `delora_lambda` is what lambda begins as, a number that is trained; w [in] holds the norms of the inputs of W as it
    began. https://arxiv.org/abs/2503.18225

    >>> DeloraConfig(r=8, lambda_pattern={"v_proj": 5}).method("layers.0.v_proj").bound
    5.0
    """

    peft_type: ClassVar[str] = "DELORA"
    bias_of_adapted = "delora_only"
    spellings: ClassVar[Mapping[str, Spelling]] = {
        "delora_A": Spelling("A"),
        "delora_B": Spelling("B"),
        "delora_lambda": Spelling("l"),
        "delora_w_norm": Spelling("w"),
    }
    neutral: ClassVar[Mapping[str, Any]] = {}

    r: int = 8
    delora_lambda: float = 15
    module_dropout: float = 0.0
    bias: Bias = "none"  # which biases of the base are trained
    init_weights: bool = True
    rank_pattern: Mapping[str, int] | None = field(default_factory=dict)
    lambda_pattern: Mapping[str, float] | None = field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count("r", self.r)
        check_number("delora_lambda", self.delora_lambda)
        check_dropout("module_dropout", self.module_dropout)
        check_counts("rank_pattern", self.rank_pattern or {})
        check_numbers("lambda_pattern", self.lambda_pattern or {})

    def told(self, name: str) -> Mapping[str, float]:
        return {"r": self.method(name).r}

    def method(self, name: str) -> Delora:
        r = pattern_value(self.rank_pattern or {}, name, self.r)
        bound = pattern_value(self.lambda_pattern or {}, name, self.delora_lambda)
        return Delora(1.0, r, float(bound), dropout=self.module_dropout, zero=self.init_weights)
