"""Which modules transformers takes for quantized ones, told by a model without weights."""

from importlib import import_module
from typing import Any

from torch import nn

from surgery.core.linears import Linears
from surgery.hosts.checkpoint import Checkpoint
from surgery.integrations.transformers.bare_model import bare_model
from surgery.integrations.transformers.model import output_heads


def linears_of(base: Checkpoint) -> Linears | None:
    """None where transformers is not there, or knows no such model. FormatError for a config that it cannot read."""
    model = bare_model(base)
    return None if model is None else _linears(model)


def _linears(model: Any) -> Linears:
    """By the rules of its quantizers: no output head, nothing that has to stay in float32, no Conv1D."""
    rules: Any = import_module("transformers.quantizers.base")
    conv1d: Any = import_module("transformers.pytorch_utils").Conv1D
    skipped = rules.HfQuantizer.get_modules_to_not_convert(model, None, model._keep_in_fp32_modules)
    should: Any = import_module("transformers.quantizers.quantizers_utils").should_convert_module
    heads = output_heads(model)
    plain = {name for name, module in model.named_modules() if type(module) is nn.Linear}
    quantized = {name for name in plain - heads if should(name, skipped)}
    alike = {name for name, module in model.named_modules() if isinstance(module, nn.Linear | conv1d)}
    return Linears(frozenset(quantized), frozenset(alike - quantized))
