"""What transformers is told of a model's quantization: to load one, and to save one that was quantized in memory."""

from collections.abc import Sequence
from importlib import import_module
from typing import Any

import torch
from torch import nn

from surgery.errors import UsageError, printable
from surgery.hosts.quantized import is_quantized
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


def tell_ejected(root: nn.Module) -> None:
    """Let a model that was quantized know which of its layers are plain now."""
    model: Any = root
    if not is_pretrained(root) or not is_bitsandbytes(model):
        return
    if not any(is_quantized(module) for module in root.modules()):
        forget_quantization(model)
        return
    plain = [name for name, module in root.named_modules() if type(module) is nn.Linear]
    model.config.quantization_config.llm_int8_skip_modules = plain
    model.hf_quantizer.modules_to_not_convert = plain


def is_bitsandbytes(model: Any) -> bool:
    """Has transformers, or surgery, told it of a quantization by bitsandbytes?"""
    quantizer = model.__dict__.get("hf_quantizer")
    return quantizer is not None and bool(quantizer.quantization_config.quant_method == "bitsandbytes")


def forget_quantization(model: Any) -> None:
    """Let a model that is written plainly say nothing of its quantization; it may share all else with another."""
    if not is_bitsandbytes(model):
        return
    conversions = model.__dict__.get("_weight_conversions") or ()
    model.hf_quantizer, model.is_quantized = None, False
    model.__dict__.pop("quantization_method", None)
    for config in (model.config, model.config.get_text_config()):
        config.__dict__.pop("quantization_config", None)
    model._weight_conversions = [one for one in conversions if not _quantizes(one)]


def _quantizes(conversion: Any) -> bool:
    operations = getattr(conversion, "operations", ())
    return any(type(one).__module__.endswith(".bitsandbytes") for one in operations)


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
