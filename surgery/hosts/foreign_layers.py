"""Layers that another library holds quantized in a way that bears no adapter here: why, and the next step.

No such library is imported here: where such a layer is, it is there already.
"""

import sys
from typing import Any

from torch import nn


def held_by_another(module: nn.Module) -> str | None:
    """None for what is held plainly, or by one of hosts.quantized."""
    if "quantization_scheme" in module.__dict__:
        return (
            "compressed-tensors has put its own forward and scales there; load the model with "
            "CompressedTensorsConfig(dequantize=True), or merge the checkpoint itself"
        )
    torchao: Any = sys.modules.get("torchao.utils")
    weight = module._parameters.get("weight")
    if torchao is not None and isinstance(weight, torchao.TorchAOBaseTensor):
        return (
            f"the {type(weight).__name__} of torchao holds its weight, which is not supported; load the model without, "
            "or merge the checkpoint itself"
        )
    return None
