"""Which modules transformers takes for quantized ones, told by a model without weights."""

from importlib import import_module
from typing import Any

import torch
from torch import nn

from surgery.core.linears import Linears
from surgery.errors import FormatError, printable
from surgery.hosts.checkpoint import Checkpoint
from surgery.integrations.transformers.loading import class_of
from surgery.integrations.transformers.model import output_heads
from surgery.procedures.tying import architecture


def linears_of(base: Checkpoint) -> Linears | None:
    """None where transformers is not there, or knows no such model. FormatError for a config that it cannot read."""
    try:
        transformers: Any = import_module("transformers")
    except ImportError:
        return None
    if base.config.get("model_type") not in transformers.CONFIG_MAPPING or not architecture(base.config):
        return None
    if _layers(base) > len(base.at):  # each layer has tensors; to build a model of more takes time
        return None
    strict: Any = import_module("huggingface_hub.errors").StrictDataclassError  # what a config's fields raise
    try:
        config = transformers.AutoConfig.from_pretrained(base.folder, trust_remote_code=False)
        with torch.device("meta"):
            model = class_of(transformers, base.folder, None)(config)
    except (
        strict,
        OSError,
        ValueError,
        TypeError,
        LookupError,
        AttributeError,
        ArithmeticError,
        RuntimeError,
    ) as error:
        raise FormatError(
            f"{printable(base.folder / 'config.json')}: transformers makes no model of it: {printable(error)}; "
            "was it edited?"
        ) from error
    return _linears(model)


def _layers(base: Checkpoint) -> int:
    """As many as any part of its config says."""
    parts = [base.config, *(one for one in base.config.values() if isinstance(one, dict))]
    told = [value for part in parts for key, value in part.items() if "layer" in key and isinstance(value, int)]
    return max(told, default=0)


def _linears(model: Any) -> Linears:
    """By the rules of its quantizers: no output head, nothing that has to stay in float32, no Conv1D."""
    rules: Any = import_module("transformers.quantizers.base")
    conv1d: Any = import_module("transformers.pytorch_utils").Conv1D
    skipped = rules.HfQuantizer.get_modules_to_not_convert(model, None, model._keep_in_fp32_modules)
    should: Any = import_module("transformers.quantizers.quantizers_utils").should_convert_module
    heads = output_heads(model)
    plain = {name for name, module in model.named_modules() if type(module) is nn.Linear}
    quantized = {name for name in plain - heads if should(name, skipped)}
    turned = {name for name, module in model.named_modules() if isinstance(module, conv1d)}
    return Linears(frozenset(quantized), frozenset((plain - quantized) | turned))
