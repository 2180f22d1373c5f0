"""Weights in each format of compressed-tensors, compressed and decompressed by it: golden files for the codecs.

python tests/peers/golden/compressed_tensors_weights.py  # writes compressed_tensors.safetensors beside it
"""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

GOLDEN = Path(__file__).with_name("compressed_tensors.safetensors")
INT4, INT8, FP8 = {"num_bits": 4, "type": "int"}, {"num_bits": 8, "type": "int"}, {"num_bits": 8, "type": "float"}
ROW, ONE, GROUPS = {"strategy": "channel"}, {"strategy": "tensor"}, {"strategy": "group", "group_size": 16}
BLOCKS = {"strategy": "block", "block_structure": [8, 32]}
NVFP4 = {
    "num_bits": 4,
    "type": "float",
    "strategy": "tensor_group",
    "group_size": 16,
    "scale_dtype": "torch.float8_e4m3fn",
}
MXFP4 = {"num_bits": 4, "type": "float", "strategy": "group", "group_size": 32}
MXFP4 |= {"scale_dtype": "torch.uint8", "zp_dtype": "torch.uint8"}
UNEVEN = {"symmetric": False}
# By name: the format, and how weights are quantized.
CASES: Mapping[str, tuple[str, dict[str, Any]]] = {
    "w4a16": ("pack-quantized", INT4 | GROUPS),
    "w4a16-asymmetric": ("pack-quantized", INT4 | GROUPS | UNEVEN),
    "w4a16-rows": ("pack-quantized", INT4 | ROW),
    "w4a16-rows-asymmetric": ("pack-quantized", INT4 | ROW | UNEVEN),
    "w4a16-one": ("pack-quantized", INT4 | ONE),
    "w8a16": ("pack-quantized", INT8 | GROUPS),
    "w8a16-rows-asymmetric": ("pack-quantized", INT8 | ROW | UNEVEN),
    "w8a8": ("int-quantized", INT8 | ROW),
    "w8a8-asymmetric": ("int-quantized", INT8 | ROW | UNEVEN),
    "w8a8-one": ("int-quantized", INT8 | ONE),
    "w8a8-groups": ("int-quantized", INT8 | GROUPS),
    "w4a8": ("int-quantized", INT4 | ROW),
    "fp8": ("float-quantized", FP8 | ROW),
    "fp8-one": ("float-quantized", FP8 | ONE),
    "fp8-blocks": ("float-quantized", FP8 | BLOCKS),
    "nvfp4": ("nvfp4-pack-quantized", NVFP4),
    "mxfp4": ("mxfp4-pack-quantized", MXFP4),
}
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


class Golden(NamedTuple):
    """One weight: as it was, the tensors that hold it, and what they are decompressed to."""

    weight: Tensor
    held: Mapping[str, Tensor]
    decompressed: Tensor


def weight_of(case: str, dtype: torch.dtype) -> Tensor:
    """Rows of different sizes, the last of zeros; rows that fill no whole number of words where they are no groups."""
    drawn = torch.Generator().manual_seed(len(case))
    columns = 50 if "rows" in case else 64
    found = torch.randn(12, columns, generator=drawn) * torch.logspace(-2, 1, 12).unsqueeze(1) + 0.01
    found[-1] = 0
    return found.to(dtype)


def golden(case: str, dtype: torch.dtype) -> Golden:
    return compressed(case, weight_of(case, dtype))


def compressed(case: str, weight: Tensor) -> Golden:
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam

    form, told = CASES[case]
    args = QuantizationArgs(**told)
    least, most = ends(weight, args)
    whole = generate_gparam(weight.min(), weight.max()) if form.startswith("nvfp4") else None
    scale, zero = calculate_qparams(least, most, args, whole)
    held = {"weight": weight, "weight_scale": scale, "weight_zero_point": zero}
    held |= {} if whole is None else {"weight_global_scale": whole}
    scheme = QuantizationScheme(targets=["Linear"], weights=args)
    compressor: Any = BaseCompressor.get_value_from_registry(form)
    compressed = {role: one.contiguous() for role, one in compressor.compress(held, scheme).items()}
    return Golden(weight, compressed, compressor.decompress(dict(compressed), scheme)["weight"].contiguous())


def ends(weight: Tensor, args: Any) -> tuple[Tensor, Tensor]:
    """The least and the largest of what shares a scale."""
    rows, columns = weight.shape
    if args.strategy in {"group", "tensor_group"}:
        parts, axes = weight.view(rows, -1, args.group_size), (2,)
    elif args.strategy == "channel":
        return weight.amin(dim=1, keepdim=True), weight.amax(dim=1, keepdim=True)
    elif args.strategy == "block":
        height, width = args.block_structure
        padded = torch.nn.functional.pad(weight, (0, -columns % width, 0, -rows % height))
        parts, axes = padded.view(-(-rows // height), height, -(-columns // width), width), (1, 3)
    else:
        return weight.min(), weight.max()
    return parts.amin(dim=axes), parts.amax(dim=axes)


def quantization_config(case: str) -> dict[str, Any]:
    """What config.json says."""
    form, told = CASES[case]
    group = {"targets": ["Linear"], "weights": told, "input_activations": None, "format": form}
    return {
        "quant_method": "compressed-tensors",
        "format": form,
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": ["lm_head"],
        "kv_cache_scheme": None,
        "sparsity_config": {},
        "transform_config": {},
    }


def read() -> Iterator[tuple[str, str, Golden]]:
    """Case, dtype, and what the file has of it."""
    from safetensors.torch import load_file

    tensors = load_file(GOLDEN)
    for case in CASES:
        for dtype in DTYPES:
            start = f"{case}.{dtype}."
            found = {name.removeprefix(start): one for name, one in tensors.items() if name.startswith(start)}
            weight, decompressed = found.pop("given"), found.pop("decompressed")
            yield case, dtype, Golden(weight, found, decompressed)


def main() -> None:
    import compressed_tensors
    from safetensors.torch import save_file

    tensors = {}
    for case in CASES:
        for name, dtype in DTYPES.items():
            one = golden(case, dtype)
            told = {**one.held, "given": one.weight, "decompressed": one.decompressed}
            tensors |= {f"{case}.{name}.{role}": values for role, values in told.items()}
    save_file(tensors, GOLDEN, {"compressed_tensors": compressed_tensors.__version__, "cases": json.dumps([*CASES])})


if __name__ == "__main__":
    main()
