"""BiasConfig: the settings of a method that can train biases of the base besides."""

from dataclasses import dataclass
from typing import ClassVar

from surgery.core.config import AdapterConfig
from surgery.methods.field_values import check_bias


@dataclass(frozen=True, kw_only=True)
class BiasConfig(AdapterConfig):
    """What the configs of such methods have; each may name the values of its `bias` in its type."""

    bias_of_adapted: ClassVar[str]  # PEFT's word for the biases of what is adapted

    bias: str = "none"  # which biases of the base are trained

    def __post_init__(self) -> None:
        super().__post_init__()
        check_bias(self.bias, self.bias_of_adapted)

    def biases(self) -> str:
        return self.bias
