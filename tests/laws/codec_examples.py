"""Weights that each codec holds, by codec and name: of every code and scale, of rows that fill no block, no word."""

from collections.abc import Mapping

import pytest
import torch
from torch import Tensor

from surgery.codecs import CODECS, packed_of
from surgery.codecs.bnb4 import Bnb4
from surgery.codecs.bnb8 import Bnb8
from surgery.codecs.compressed_ints import IntQuantized, PackQuantized
from surgery.codecs.fp8_block import Fp8Block
from surgery.codecs.mxfp4 import Mxfp4
from surgery.codecs.mxfp4_packed import Mxfp4Packed
from surgery.codecs.nvfp4 import Nvfp4
from surgery.codecs.torchao import TorchaoFp8, TorchaoInt8
from surgery.core.codec import Packed

HALVES = {torch.bfloat16: 8, torch.float16: 11}  # bits of the mantissa


def all_values(dtype: torch.dtype) -> Tensor:
    """Every value of a half type but NaN: subnormals, both zeros and infinities."""
    values = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype)
    return values[~torch.isnan(values)]


def sample(dtype: torch.dtype) -> Tensor:
    """Normal numbers, both zeros, infinities, ends and subnormals."""
    info = torch.finfo(dtype)
    tiny = [info.smallest_normal, info.smallest_normal / 4]
    ends = [0.0, -0.0, torch.inf, -torch.inf, info.max, info.min, *tiny]
    normal = torch.randn(56, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    return torch.cat([torch.tensor(ends, dtype=torch.float64), normal]).to(dtype).view(8, 8)


def plain() -> Mapping[str, Packed]:
    kept = {"bias": torch.arange(8.0)}
    halves = {str(dtype): Packed({"weight": all_values(dtype)}) for dtype in HALVES}
    single, double = (Packed({"weight": sample(dtype), **kept}) for dtype in (torch.float32, torch.float64))
    columns = Packed({"weight": sample(torch.bfloat16).T})
    scalar, empty = Packed({"weight": torch.tensor(1.5)}), Packed({"weight": torch.empty(0, 4)})
    settings = Packed({"weight": sample(torch.float16)}, {"written_by": "a test"})
    others = {"columns": columns, "scalar": scalar, "empty": empty, "settings": settings}
    return {**halves, "float32": single, "float64": double, **others}


def weights(rows: int, columns: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Rows of different sizes, one of them of zeros, one with an outlier."""
    drawn = torch.Generator().manual_seed(rows)
    found = torch.randn(rows, columns, generator=drawn) * torch.logspace(-3, 1, rows).unsqueeze(1)
    found[rows // 2], found[0, 0] = 0.0, 40.0
    return found.to(dtype)


def wider(packed: Packed, dtype: torch.dtype) -> Packed:
    """The same with its codes in elements of `dtype`, as `quant_storage` has them."""
    codes = packed.tensors["weight"].flatten().view(dtype).unsqueeze(1)
    return packed._replace(tensors={**packed.tensors, "weight": codes})


def bnb4() -> Mapping[str, Packed]:
    make = Bnb4().fresh
    nf4, fp4 = {"quant_type": "nf4"}, {"quant_type": "fp4"}
    return {
        "nf4": make(weights(12, 64), nf4),
        "fp4": make(weights(12, 64, torch.bfloat16), fp4),
        "double": make(weights(33, 512), nf4 | {"double_quant": True, "blocksize": 32}),
        "fp4-double": make(weights(33, 100, torch.float16), fp4 | {"double_quant": True, "blocksize": 32}),
        "rows-within-blocks": make(weights(12, 10), nf4 | {"blocksize": 256}),
        "odd-rows": make(weights(9, 7), nf4 | {"double_quant": True}),
        "wide": wider(make(weights(12, 12, torch.bfloat16), fp4), torch.bfloat16),
        "wider": wider(make(weights(12, 10), nf4 | {"double_quant": True}), torch.float32),
    }


def bnb8() -> Mapping[str, Packed]:
    return {"rows": Bnb8().fresh(weights(12, 10), {}), "bias": Bnb8().fresh(weights(3, 5), {})}


def fp8_block() -> Mapping[str, Packed]:
    every = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).repeat(6, 1)
    e5m2 = torch.arange(256, dtype=torch.uint8).view(torch.float8_e5m2).repeat(6, 1)
    rows = torch.logspace(-3, 3, 6)
    bytes_ = torch.tensor([[100, 150], [0, 254]], dtype=torch.uint8)
    return {
        "blocks": Fp8Block().fresh(weights(12, 20), {"weight_block_size": (4, 5)}),
        "cut-blocks": Fp8Block().fresh(weights(150, 200), {}),
        "rows": packed_of({"weight": every, "weight_scale": rows.unsqueeze(1)}, "rows"),
        "rows-flat": packed_of({"weight": e5m2, "weight_scale": rows, "input_scale": torch.ones(1)}, "rows"),
        "whole": packed_of({"weight": every, "weight_scale_inv": torch.tensor(0.3).bfloat16()}, "whole"),
        "powers": packed_of(
            {"weight": every[:, :128].contiguous(), "weight_scale_inv": bytes_},
            "powers",
            {"weight_block_size": [3, 64]},
        ),
        "turned": packed_of({"weight": every, "weight_scale_inv": -rows}, "a scale below zero"),
    }


def mxfp4() -> Mapping[str, Packed]:
    drawn = torch.Generator().manual_seed(0)
    blocks = torch.randint(0, 256, (5, 4, 2, 16), dtype=torch.uint8, generator=drawn)
    scales = torch.randint(0, 256, (5, 4, 2), dtype=torch.uint8, generator=drawn)
    fresh = Mxfp4().fresh(weights(320, 8).view(5, 64, 8), {})
    rows = {role: one.flatten(0, 1) for role, one in fresh.tensors.items()}
    return {"experts": Packed({"blocks": blocks, "scales": scales}), "fresh": fresh, "rows-of-experts": Packed(rows)}


def pack_quantized() -> Mapping[str, Packed]:
    make, uneven = PackQuantized().fresh, {"symmetric": False}
    fresh = {
        "groups": make(weights(12, 64, torch.bfloat16), {"group_size": 16}),
        "uneven": make(weights(21, 64), {"group_size": 32} | uneven),
        "uneven-rows": make(weights(9, 50, torch.float16), {"group_size": -1} | uneven),
        "bytes": make(weights(12, 64), {"num_bits": 8, "group_size": 64}),
        "uneven-bytes": make(weights(11, 30), {"num_bits": 8, "group_size": -1} | uneven),
    }
    one = fresh["groups"].tensors | {"weight_scale": torch.tensor([0.3]), "input_scale": torch.ones(1)}
    words = torch.randint(-(2**31), 2**31, (7, 3), generator=torch.Generator().manual_seed(0)).to(torch.int32)
    every = {"weight_packed": words, "weight_scale": -torch.logspace(-3, 3, 7).unsqueeze(1)}
    filled = every | {"weight_shape": torch.tensor([7, 19])}  # what fills the last word is not zero
    return fresh | {"one": packed_of(one, "one scale"), "filled": packed_of(filled, "scales below zero")}


def int_quantized() -> Mapping[str, Packed]:
    every = torch.arange(-128, 128).to(torch.int8).repeat(6, 1)
    rows = torch.logspace(-3, 3, 6).unsqueeze(1)
    zeros = torch.tensor([-128, 127, 0, 1, -1, 5], dtype=torch.int8).unsqueeze(1)
    one = {"weight": every, "weight_scale": torch.tensor([0.3]), "input_zero_point": torch.zeros(1, dtype=torch.int8)}
    return {
        "rows": IntQuantized().fresh(weights(12, 10, torch.bfloat16), {}),
        "groups": IntQuantized().fresh(weights(12, 64), {"group_size": 16, "symmetric": False}),
        "nibbles": IntQuantized().fresh(weights(12, 10), {"num_bits": 4}),
        "uneven": packed_of({"weight": every, "weight_scale": rows, "weight_zero_point": zeros}, "rows"),
        "one": packed_of(one, "one scale"),
    }


def nvfp4() -> Mapping[str, Packed]:
    drawn = torch.Generator().manual_seed(0)
    octets = torch.randint(0, 256, (128, 16), dtype=torch.uint8, generator=drawn)
    scales = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).view(128, 2)  # every scale, NaN too
    held = {"weight_packed": octets, "weight_scale": scales, "weight_global_scale": torch.tensor([3.0])}
    fresh = Nvfp4().fresh(weights(12, 64, torch.bfloat16), {})
    return {"fresh": fresh, "every-scale": packed_of(held, "every scale")}


def mxfp4_packed() -> Mapping[str, Packed]:
    octets = torch.randint(0, 256, (128, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    held = {"weight_packed": octets, "weight_scale": torch.arange(256, dtype=torch.uint8).view(128, 2)}  # every scale
    fresh = Mxfp4Packed().fresh(weights(12, 64, torch.bfloat16), {})
    return {"fresh": fresh, "every-scale": packed_of(held, "every scale")}


def torchao_int8() -> Mapping[str, Packed]:
    make = TorchaoInt8().fresh
    return {"rows": make(weights(12, 10), {}), "groups": make(weights(12, 64), {"group_size": 16})}


def torchao_fp8() -> Mapping[str, Packed]:
    one = {"qdata": torch.ones(6, 5).to(torch.float8_e4m3fn), "scale": torch.tensor([[0.3]])}
    return {"rows": TorchaoFp8().fresh(weights(12, 10), {}), "one": packed_of(one, "one scale")}


EXAMPLES = {  # by codec
    "plain": plain(),
    "bnb4": bnb4(),
    "bnb8": bnb8(),
    "fp8_block": fp8_block(),
    "mxfp4": mxfp4(),
    "pack-quantized": pack_quantized(),
    "int-quantized": int_quantized(),
    "nvfp4-pack-quantized": nvfp4(),
    "mxfp4-pack-quantized": mxfp4_packed(),
    "torchao-int8": torchao_int8(),
    "torchao-fp8": torchao_fp8(),
}
CASES = [pytest.param(codec, name, id=f"{codec.name}-{name}") for codec in CODECS for name in EXAMPLES[codec.name]]
