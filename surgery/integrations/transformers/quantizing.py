"""What transformers is told of a model's quantization: to load one, and to save one that was quantized in memory."""

from collections.abc import Mapping, Sequence
from importlib import import_module
from typing import Any

import torch
from torch import nn

from surgery.codecs import codec_of
from surgery.codecs.bitsandbytes_config import OUTLIERS
from surgery.errors import StateError, UsageError, printable
from surgery.hosts.quantized import compute_dtype, is_quantized, packed_of_layer
from surgery.integrations.transformers.model import is_pretrained
from surgery.procedures.live.quantize import BITS, Quantization, import_bitsandbytes

# By quant_method, what its config calls the modules that are left plain.
_SKIPPED = {"bitsandbytes": "llm_int8_skip_modules", "fp8": "modules_to_not_convert"}
_FORMS = {"bnb8": "int8", "fp8_block": "fp8"}
# The modules of transformers that decode weights, and encode them again.
_OPERATIONS = (".bitsandbytes", ".finegrained_fp8", ".compressed_tensors", ".torchao", ".mxfp4")


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
    _tell(model, settings_of(wanted, model.dtype, skipped), skipped, pre_quantized=False)


def _tell(model: Any, settings: Any, skipped: Sequence[str], pre_quantized: bool) -> None:
    quantizers: Any = import_module("transformers.quantizers")
    quantizer: Any = quantizers.AutoHfQuantizer.from_config(settings, pre_quantized=pre_quantized)
    quantizer.modules_to_not_convert = list(skipped)
    model.hf_quantizer, model.is_quantized = quantizer, True
    model.quantization_method = quantizer.quantization_config.quant_method
    quantizer.postprocess_model(model)


def tell_ejected(root: nn.Module) -> None:
    """Let a model know in what its layers are held now; where that is no one format, it refuses to be saved.

    What transformers writes of a model names one.
    """
    model: Any = root
    if not is_pretrained(root):
        return
    held = {_form_of(module): module for module in root.modules() if is_quantized(module)}
    if not held:
        forget_quantization(model)
        return
    plain = [name for name, module in root.named_modules() if type(module) is nn.Linear]
    skipped = _SKIPPED.get(quantization_of(model))
    if len(held) > 1:
        if model.__dict__.get("hf_quantizer") is None:
            _tell(model, _settings_of_layer(model, *held.popitem(), plain), plain, pre_quantized=True)
        model.hf_quantizer.is_serializable = lambda: False
    elif skipped is None or {*held} != {_told_form(model)}:
        _tell(model, _settings_of_layer(model, *held.popitem(), plain), plain, pre_quantized=True)
    else:
        setattr(model.config.quantization_config, skipped, plain)
        model.hf_quantizer.modules_to_not_convert = plain


def _form_of(module: nn.Module) -> str:
    """nf4, fp4, int8 or fp8."""
    packed = packed_of_layer(module)
    return str(packed.settings.get("quant_type") or _FORMS[codec_of(packed, "").name])


def _told_form(model: Any) -> str:
    """The same, as its config tells."""
    told = model.hf_quantizer.quantization_config
    if told.quant_method == "fp8":
        return "fp8"
    return "int8" if told.load_in_8bit else str(told.bnb_4bit_quant_type)


def _settings_of_layer(model: Any, form: str, module: nn.Module, skipped: Sequence[str]) -> Any:
    """The config by which transformers holds a layer so."""
    settings = packed_of_layer(module).settings
    if form == "fp8":
        transformers: Any = import_module("transformers")
        block = settings["weight_block_size"]
        return transformers.FineGrainedFP8Config(weight_block_size=block, modules_to_not_convert=list(skipped))
    computed = None if form == "int8" else compute_dtype(module)
    return settings_of(Quantization(form, computed, "nested_offset" in settings), model.dtype, skipped)


def quantization_of(model: Any) -> str:
    """By what transformers, or surgery, has told it that it is quantized; empty where that is nothing known here."""
    quantizer = model.__dict__.get("hf_quantizer")
    told = None if quantizer is None else quantizer.quantization_config.quant_method
    return next((method for method in _SKIPPED if told == method), "")  # it is an enum of strings


def forget_quantization(model: Any) -> None:
    """Let a model that is written plainly say nothing of its quantization; it may share all else with another."""
    _forget_decoding(model)
    if not quantization_of(model):
        return
    model.hf_quantizer, model.is_quantized = None, False
    model.__dict__.pop("quantization_method", None)
    for config in (model.config, model.config.get_text_config()):
        config.__dict__.pop("quantization_config", None)


def keep_codes(model: Any) -> None:
    """Let a model be saved as it is told, its quantized weights as they are; it may share all with another.

    What quantizes it would tell other tensors.
    """
    _forget_decoding(model)
    model.hf_quantizer = None


def _forget_decoding(model: Any) -> None:
    """What transformers has decoded as it was loaded, it would encode again as it is saved, with no word of it."""
    conversions = model.__dict__.get("_weight_conversions")
    if conversions:
        model._weight_conversions = [one for one in conversions if not 0 < _decoding(one) == len(one.operations)]


def refuse_joined(model: Any) -> None:
    """StateError where transformers has decoded weights and made experts of them, in one step that is undone whole."""
    for one in model.__dict__.get("_weight_conversions") or ():
        if _decoding(one):
            raise StateError(
                f"save_merged: {', '.join(map(printable, one.target_patterns))}: decoded and joined as they were "
                "loaded, which transformers would encode again; save the adapter, and merge the checkpoint"
            )


def _decoding(conversion: Any) -> int:
    """How many of its operations decode weights; 0 of what only renames."""
    return sum(type(one).__module__.endswith(_OPERATIONS) for one in getattr(conversion, "operations", ()))


def load_settings(kind: Any, config: Any, dtype: Any) -> dict[str, Any]:
    """What `from_pretrained` is to be given besides. UsageError where the files are quantized already.

    A config of the same method is taken over these where it asks for them decoded: transformers passes over all else
    that it says.
    """
    if kind is None:
        return {}
    wanted, there = _wanted(kind), getattr(config, "quantization_config", None)
    decodes = wanted is None and bool(getattr(kind, "dequantize", False))
    if there is not None and not (decodes and _method(kind) == _method(there)):
        raise UsageError(
            f"load_model: quantization is given, and the model is held quantized already, by {_method(there)}; leave "
            "it out, or give transformers' config of that method with dequantize=True, where it takes that"
        )
    if wanted is None:
        return {"quantization_config": kind}
    import_bitsandbytes("load_model")
    named = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    held = named if isinstance(named, torch.dtype) else getattr(config, "dtype", None)
    return {"quantization_config": settings_of(wanted, held or torch.float32)}


def _method(told: Any) -> str:
    """Of a config of transformers, or of its fields."""
    method = told.get("quant_method") if isinstance(told, Mapping) else getattr(told, "quant_method", None)
    return str(getattr(method, "value", method))


def _wanted(kind: Any) -> Quantization | None:
    """None for a config of transformers, which says all by itself."""
    configs: Any = import_module("transformers.utils.quantization_config")
    if isinstance(kind, configs.QuantizationConfigMixin):
        return None
    if isinstance(kind, str):
        return Quantization(kind)
    raise UsageError(
        f"load_model: quantization is {printable(kind)!r}; one of {', '.join(BITS)}, or a config of transformers such "
        "as BitsAndBytesConfig, is wanted"
    )
