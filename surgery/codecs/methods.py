"""What quantization_config.quant_method calls the formats that are read, and what to do about others."""

from collections.abc import Mapping
from typing import Any

from surgery.codecs import compressed_config, torchao
from surgery.errors import FormatError, printable

METHODS = ("bitsandbytes", "fp8", "fbgemm_fp8", "mxfp4", compressed_config.METHOD, torchao.METHOD)
# Where each kind of quantization_config lists the modules that are held plainly.
LISTED_PLAINLY = {
    "bitsandbytes": "llm_int8_skip_modules",
    "fp8": "modules_to_not_convert",
    "mxfp4": "modules_to_not_convert",
    compressed_config.METHOD: "ignore",
    torchao.METHOD: "modules_to_not_convert",
}
_OTHERS = {
    "gptq": "merge into the base that it was quantized from, and quantize that anew with GPTQModel",
    "awq": "merge into the base that it was quantized from, and quantize that anew with llm-compressor",
    "hqq": "merge into the base that it was quantized from, and quantize that anew with hqq",
}


def refuse_unread(told: Mapping[str, Any]) -> None:
    """FormatError, with the next step, where a quantization_config is of a format that no codec reads."""
    method = told.get("quant_method")
    if method not in METHODS:
        step = _OTHERS.get(str(method), "dequantize it first")
        raise FormatError(
            f"quantized with {printable(method)}, which is not supported; {', '.join(METHODS)} or a plain base "
            f"is wanted; {step}"
        )
    if method == compressed_config.METHOD:
        compressed_config.refuse_unsupported(told)
    if method == torchao.METHOD:
        torchao.refuse_unsupported(told)
