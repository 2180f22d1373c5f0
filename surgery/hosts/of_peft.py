"""Models that have adapters of peft, which surgery leaves alone. peft is never imported here."""

import sys
from typing import Any

from torch import nn

from surgery.errors import StateError


def refuse_adapters_of_peft(root: nn.Module) -> None:
    """StateError where peft has laid adapters over the model, or wraps it."""
    peft: Any = sys.modules.get("peft")
    if peft is None or not (isinstance(root, peft.PeftModel) or "peft_config" in root.__dict__):
        return
    if isinstance(root, peft.PeftModel) or any(_is_layer_of_peft(module) for module in root.modules()):
        raise StateError(
            "the model has adapters of peft; a model without them is wanted: save them by peft and surgery.load them "
            "over the base, or call model.unload() first and take what it returns"
        )


def _is_layer_of_peft(module: nn.Module) -> bool:
    tuners: Any = sys.modules["peft.tuners.tuners_utils"]
    return isinstance(module, tuners.BaseTunerLayer)
