"""What a quantization_config of bitsandbytes says, as transformers writes it."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch

OUTLIERS = 6.0  # inputs above it are computed in 16 bits, as transformers has it


def told(kind: str, dtype: torch.dtype, plainly: Sequence[str], *, double: bool = False) -> Mapping[str, Any]:
    """`kind` nf4, fp4 or int8."""
    bits8 = kind == "int8"
    return {
        "quant_method": "bitsandbytes",
        "load_in_4bit": not bits8,
        "load_in_8bit": bits8,
        "llm_int8_threshold": OUTLIERS,
        "llm_int8_skip_modules": list(plainly),
        "llm_int8_enable_fp32_cpu_offload": False,
        "llm_int8_has_fp16_weight": False,
        "bnb_4bit_quant_type": "fp4" if bits8 else kind,
        "bnb_4bit_use_double_quant": double,
        "bnb_4bit_compute_dtype": "float32" if bits8 else str(dtype).removeprefix("torch."),
        "bnb_4bit_quant_storage": "uint8",
    }
