"""What transformers is told of a model's quantization: to load one, and to save one that was quantized in memory."""

from collections.abc import Sequence
from importlib import import_module
from typing import Any

import torch
from torch import nn

from surgery.errors import UsageError, printable
from surgery.integrations.transformers.model import is_pretrained
from surgery.procedures.quantize import BITS, OUTLIERS, Quantization, import_bitsandbytes


def settings_of(wanted: Quantization, dtype: torch.dtype, skipped: Sequence[str] | None = None) -> Any:
    """The BitsAndBytesConfig; `dtype` is that of the model."""
    transformers: Any = import_module("transformers")
    if BITS[wanted.kind] == 8:
        told: dict[str, Any] = {"load_in_8bit": True, "llm_int8_threshold": OUTLIERS}
    else:
        told = {
            "load_in_4bit": True,
            "bnb_4bit_quant_type": wanted.kind,
            "bnb_4bit_compute_dtype": wanted.compute_dtype or dtype,
            "bnb_4bit_use_double_quant": wanted.double_quant,
        }
    return transformers.BitsAndBytesConfig(**told, llm_int8_skip_modules=None if skipped is None else list(skipped))


def tell_quantized(root: nn.Module, wanted: Quantization, skipped: Sequence[str]) -> None:
    """Let a model of transformers know, so that it saves itself as a quantized checkpoint."""
    if not is_pretrained(root):
        return
    model: Any = root
    quantizers: Any = import_module("transformers.quantizers")
    quantizer: Any = quantizers.AutoHfQuantizer.from_config(
        settings_of(wanted, model.dtype, skipped), pre_quantized=False
    )
    quantizer.modules_to_not_convert = list(skipped)
    model.hf_quantizer, model.is_quantized = quantizer, True
    model.quantization_method = quantizer.quantization_config.quant_method
    quantizer.postprocess_model(model)


def load_settings(kind: str | None, config: Any, dtype: Any) -> dict[str, Any]:
    """What `from_pretrained` is to be given besides. UsageError where the files are quantized already."""
    if kind is None:
        return {}
    wanted, there = Quantization(kind), getattr(config, "quantization_config", None)
    if there is not None:
        raise UsageError(
            f"load_model: quantization={printable(kind)!r}, and the model is held quantized already; leave it out"
        )
    import_bitsandbytes("load_model")
    named = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    held = named if isinstance(named, torch.dtype) else getattr(config, "dtype", None)
    return {"quantization_config": settings_of(wanted, held or torch.float32)}
