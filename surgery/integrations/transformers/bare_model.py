"""A model of transformers without weights, of a checkpoint's config."""

from importlib import import_module
from typing import Any

import torch

from surgery.errors import FormatError, printable
from surgery.hosts.checkpoint import Checkpoint
from surgery.integrations.transformers.loading import NAME_ONE, class_of
from surgery.procedures.places.tying import architecture

_STEP = f"{NAME_ONE}, or leave into out"


def bare_model(base: Checkpoint) -> Any:
    """None where transformers is not there, or knows no such model.

    FormatError for a config that it cannot read, InputError for a class that it has not.
    """
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
            return class_of(transformers, base.folder, None, _STEP)(config)
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


def _layers(base: Checkpoint) -> int:
    """As many as any part of its config says; max_window_layers is what those of Qwen are held against."""
    parts = [base.config, *(one for one in base.config.values() if isinstance(one, dict))]
    items = [item for part in parts for item in part.items() if item[0] != "max_window_layers"]
    told = [value for key, value in items if "layer" in key and isinstance(value, int)]
    return max(told, default=0)
