"""LNTuningConfig: modules that are trained whole, norms above all. https://arxiv.org/abs/2312.11420"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from surgery.core.config import AdapterConfig
from surgery.core.method import Method
from surgery.core.spec import Spelling
from surgery.errors import printable


@dataclass(frozen=True, kw_only=True)
class LNTuningConfig(AdapterConfig):
    """Which modules are trained whole, named as in PEFT: a copy of each, of any kind and with all that it holds.

    Its tensors are shaped as the module's. A merge puts them in their place.

    >>> import surgery, torch
    >>> model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.LayerNorm(4))
    >>> model = surgery.inject(model, surgery.LNTuningConfig(target_modules=["1"]))
    >>> [name for name, p in model.named_parameters() if p.requires_grad]
    ['1.ln_tuning_layers.default.weight', '1.ln_tuning_layers.default.bias']
    """

    peft_type: ClassVar[str] = "LN_TUNING"
    spellings: ClassVar[Mapping[str, Spelling]] = {}
    neutral: ClassVar[Mapping[str, Any]] = {}
    unwritten = frozenset({"layers_to_transform", "layers_pattern"})
    copied = "ln_tuning_layers"
    title = "LN tuning"

    def method(self, name: str) -> Method:
        raise AssertionError(f"{printable(name)} is copied, and has no site")
