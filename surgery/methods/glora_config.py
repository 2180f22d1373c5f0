"""GloraConfig: GLoRA's settings, and the method that they mean at a site."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from surgery.core.spec import Spelling
from surgery.errors import ConfigError, quoted
from surgery.methods.bias_config import BiasConfig
from surgery.methods.field_values import check_count
from surgery.methods.glora import ENDS, Glora

Bias = Literal["none", "all", "glora_only"]
_KINDS = {
    "config_A_B": ("lora", "vector", "constant", "none"),
    "config_C": ("lora", "vector", "none"),
    "config_D_E": ("vector", "constant", "none"),
}


@dataclass(frozen=True, kw_only=True)
class GloraConfig(BiasConfig):
    """GLoRA's settings, named as in PEFT: W + W * A + B, and bias + bias * D + E + W C.

    Each of A to E is a product of rank r ("lora"), a number for each output, of C for each input ("vector"), one
    number ("constant") or "none". A module without a bias has no C, D and E. https://arxiv.org/abs/2306.07967

    >>> import surgery, torch
    >>> model = torch.nn.Sequential(torch.nn.Linear(16, 8))
    >>> _ = surgery.inject(model, GloraConfig(r=2, target_modules=["0"]))
    >>> model[0].glora_A["default"].Xd.shape, model[0].glora_C["default"].Xd.shape, model[0].glora_E["default"].X.shape
    (torch.Size([8, 2]), torch.Size([16, 2]), torch.Size([1]))
    """

    peft_type: ClassVar[str] = "GLORA"
    bias_of_adapted = "glora_only"
    spellings: ClassVar[Mapping[str, Spelling]] = {
        f"glora_{letter}.{leaf}": Spelling(f"{letter}{end}")
        for letter in "ABCDE"
        for ends in ENDS.values()
        for end, leaf in ends.items()
    }
    neutral: ClassVar[Mapping[str, Any]] = {}
    unwritten = frozenset({"exclude_modules", "layers_to_transform", "layers_pattern"})

    r: int = 8
    bias: Bias = "none"  # which biases of the base are trained
    config_A_B: Literal["lora", "vector", "constant", "none"] = "lora"  # noqa: N815  # as in PEFT
    config_C: Literal["lora", "vector", "none"] = "lora"  # noqa: N815  # the same
    config_D_E: Literal["vector", "constant", "none"] = "constant"  # noqa: N815  # the same
    init_weights: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count("r", self.r)
        for field, kinds in _KINDS.items():
            value = getattr(self, field)
            if value not in kinds:
                raise ConfigError(f"{field} is {quoted(value)}; one of {', '.join(map(repr, kinds))} is wanted")

    def told(self, name: str) -> Mapping[str, float]:  # noqa: ARG002  # the same everywhere
        return {"r": self.r}

    def endings(self) -> Mapping[str, Spelling]:
        roles = frozenset().union(*self.forms())
        return {ending: one for ending, one in self.spellings.items() if one.role in roles}

    def forms(self) -> Collection[frozenset[str]]:
        """With a bias, and without."""
        biased = (self.config_A_B, self.config_C, self.config_D_E)
        return [_roles(biased), _roles((self.config_A_B, "none", "none"))]

    def method(self, name: str) -> Glora:  # noqa: ARG002  # the same everywhere
        return Glora(self.r, (self.config_A_B, self.config_C, self.config_D_E), zeros=self.init_weights)


def _roles(kinds: tuple[str, str, str]) -> frozenset[str]:
    by_letter = zip("ABCDE", (kinds[0], *kinds, kinds[2]), strict=True)
    return frozenset(f"{letter}{end}" for letter, kind in by_letter for end in ENDS[kind])
