"""Weights as the libraries of formats hold and decode them: a line for each codec, which the laws run over."""

import sys
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from surgery.codecs import packed_of
from surgery.core.codec import Packed, Settings

sys.path.insert(0, str(Path(__file__).with_name("golden")))
import compressed_tensors_weights as made

HALVES = (torch.float32, torch.bfloat16, torch.float16)
BLOCKSIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
SHAPES = ((32, 1024), (48, 7), (96, 130))  # of whole blocks, of less than one in a row, and of neither
FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)


class Held(NamedTuple):
    """One weight, as its library holds it."""

    packed: Packed
    decoded: Mapping[torch.dtype, Callable[[], Tensor]]  # by the library, in each dtype to which it decodes it
    weight: Tensor | None = None  # what the library made it of
    fresh: Settings | None = None  # by which a fresh weight has its codes and scales; None: the library's are others


Cases = Iterator[tuple[str, Callable[[], Held]]]


def weight(rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    """Rows of different sizes, one of zeros, one with an outlier."""
    drawn = torch.Generator().manual_seed(columns)
    found = torch.randn(rows, columns, generator=drawn) * torch.rand(rows, 1, generator=drawn)
    found[0, 0], found[1] = 40.0, 0.0
    return found.to(dtype)


def same(left: Tensor, right: Tensor) -> bool:
    """To the bit, the sign of zeros included."""
    octets = (one.contiguous().flatten().view(torch.uint8) for one in (left, right))
    return (left.dtype, left.shape) == (right.dtype, right.shape) and torch.equal(*octets)


def word(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def bitsandbytes4() -> Cases:
    for kind, nested, blocksize, dtype in product(("nf4", "fp4"), (False, True), BLOCKSIZES, HALVES):
        name = f"{kind}{'-double' if nested else ''}-{blocksize}-{word(dtype)}"
        for shape in SHAPES[:2] if nested else SHAPES:
            yield f"{name}-{shape[1]}", partial(by_bitsandbytes4, kind, nested, blocksize, dtype, shape)
    for storage, nested in product(HALVES, (False, True)):
        make = partial(by_bitsandbytes4, "nf4", nested, 64, torch.bfloat16, (24, 64))
        yield f"{'double-' if nested else ''}stored-in-{word(storage)}", partial(make, storage=storage)


def by_bitsandbytes4(
    kind: str,
    nested: bool,
    blocksize: int,
    dtype: torch.dtype,
    shape: tuple[int, int],
    storage: torch.dtype = torch.uint8,
) -> Held:
    import bitsandbytes.functional as bnb

    given = weight(*shape, dtype)
    codes, state = bnb.quantize_4bit(given, None, None, blocksize, nested, kind, storage)
    tensors = {f"weight.{key}": one for key, one in state.as_dict(packed=True).items()}

    def decoded(to: torch.dtype) -> Tensor:
        state.dtype = to
        return bnb.dequantize_4bit(codes, state)

    # Its kernel for CPUs with AVX512 takes the scales of other blocks where these run over the ends of such rows.
    by_library = {} if shape == SHAPES[2] else {to: partial(decoded, to) for to in HALVES}
    # The offset of a double quantization is summed in another order there.
    fresh = None if nested or storage != torch.uint8 else {"quant_type": kind, "blocksize": blocksize}
    return Held(packed_of({"weight": codes, **tensors}, "a test"), by_library, given, fresh)


def bitsandbytes8() -> Cases:
    for dtype in HALVES:
        yield word(dtype), partial(by_bitsandbytes8, dtype)
    yield "every-code", every_code_of_bitsandbytes8


def by_bitsandbytes8(dtype: torch.dtype) -> Held:
    from bitsandbytes.nn import Int8Params

    given = weight(64, 96, dtype)
    given[1] = 1.0  # of a row of zeros it divides by zero
    held = Int8Params(given.clone(), requires_grad=False).to("cpu")
    return in_bitsandbytes8(held.data, held.SCB)._replace(weight=given, fresh={})


def every_code_of_bitsandbytes8() -> Held:
    scales = torch.rand(40, generator=torch.Generator().manual_seed(0)) * torch.logspace(-4, 4, 40)
    return in_bitsandbytes8(torch.arange(-128, 128, dtype=torch.int8).repeat(40, 1), scales)


def in_bitsandbytes8(codes: Tensor, scales: Tensor) -> Held:
    import bitsandbytes.functional as bnb

    tensors = {"weight": codes, "SCB": scales, "weight_format": torch.zeros((), dtype=torch.uint8)}
    return Held(packed_of(tensors, "a test"), {torch.float32: lambda: bnb.int8_vectorwise_dequant(codes, scales)})


def fp8_of_transformers() -> Cases:
    grids = ((2, 3), (1, 1), (256, 1), (1, 6), (256, 384))
    for code, grid, scale in product(FP8, grids, (torch.float32, torch.bfloat16, torch.uint8)):
        name = f"{word(code)}-{grid[0]}x{grid[1]}-{word(scale)}"
        yield name, partial(every_code_of_fp8, code, grid, scale)
    for shape in ((128, 256), (256, 128)):
        yield f"{shape[0]}x{shape[1]}", partial(by_fp8_of_transformers, shape)


def every_code_of_fp8(code: torch.dtype, grid: tuple[int, int], scale: torch.dtype) -> Held:
    codes = torch.arange(256 * 384).to(torch.uint8).view(256, 384).view(code)
    drawn = torch.Generator().manual_seed(0)
    if scale == torch.uint8:
        scales = torch.randint(0, 256, grid, generator=drawn, dtype=torch.uint8)
    else:
        scales = torch.rand(grid, generator=drawn).mul(3).to(scale)
    return in_fp8_of_transformers(codes, scales, [256 // grid[0], 384 // grid[1]])


def by_fp8_of_transformers(shape: tuple[int, int]) -> Held:
    from transformers.integrations.finegrained_fp8 import Fp8Quantize

    given = torch.randn(shape, generator=torch.Generator().manual_seed(0)) * torch.logspace(-4, 4, shape[1])
    given[:128, :128] = 0
    given = given.bfloat16()
    config = SimpleNamespace(weight_block_size=(128, 128), scale_fmt="float")
    held = Fp8Quantize(SimpleNamespace(quantization_config=config))._quantize_one("weight", given)
    found = in_fp8_of_transformers(held["weight"], held["weight_scale_inv"], [128, 128])
    return found._replace(weight=given, fresh={})


def in_fp8_of_transformers(codes: Tensor, scales: Tensor, block: list[int]) -> Held:
    from transformers.integrations.finegrained_fp8 import Fp8Dequantize

    packed = packed_of({"weight": codes, "weight_scale_inv": scales}, "a test", {"weight_block_size": block})
    decode = partial(Fp8Dequantize(None)._dequantize_one, codes, scales)
    return Held(packed, {dtype: partial(decode, dtype) for dtype in HALVES})


def mxfp4_of_transformers() -> Cases:
    yield "every-byte-and-scale", every_byte_of_mxfp4


def every_byte_of_mxfp4() -> Held:
    from transformers.integrations.mxfp4 import _convert_moe_packed_tensors

    blocks = torch.arange(8 * 16).to(torch.uint8).view(8, 16).repeat(256, 2, 1).view(2, 256, 8, 16).contiguous()
    scales = torch.arange(256, dtype=torch.uint8).view(1, 256, 1).repeat(2, 1, 8)
    decoded = {dtype: partial(_convert_moe_packed_tensors, blocks, scales, dtype=dtype) for dtype in HALVES}
    return Held(packed_of({"blocks": blocks, "scales": scales}, "a test"), decoded)


def compressed_tensors(*forms: str) -> Cases:
    """From the golden file, so that nothing needs the library."""
    for case, dtype, golden in made.read():
        form, told = made.CASES[case]
        if form in forms:
            yield f"{case}-{dtype}", partial(in_compressed_tensors, case, golden, told)


def in_compressed_tensors(case: str, golden: made.Golden, told: Mapping[str, Any]) -> Held:
    packed = packed_of(golden.held, case, made.quantization_config(case))
    # What stands for settings of `fresh` in the configs; others have codes that are not made here so.
    alike = told["strategy"] in {"group", "channel", "tensor_group"} and "fp8" not in case
    fresh = {"group_size": -1, **told} if alike else None
    return Held(packed, {golden.decompressed.dtype: lambda: golden.decompressed}, golden.weight, fresh)


def torchao(*kinds: str) -> Cases:
    for kind, dtype in product(kinds, HALVES):
        yield f"{kind}-{word(dtype)}", partial(by_torchao, kind, dtype)


def by_torchao(kind: str, dtype: torch.dtype) -> Held:
    ao = pytest.importorskip("torchao.quantization")
    from torchao.quantization.quant_primitives import MappingType

    given, by = weight(12, 64, dtype), kind.partition("-")[2]
    given[1] = 1.0  # of a row of zeros in fp8 it divides by zero
    granularity = {"rows": ao.PerRow(), "uneven": ao.PerRow(), "one": ao.PerTensor(), "groups": ao.PerGroup(16)}[by]
    if kind.startswith("fp8"):
        tensor = ao.Float8Tensor.from_hp(given, granularity=granularity)
    else:
        mapping = MappingType.ASYMMETRIC if by == "uneven" else MappingType.SYMMETRIC
        tensor = ao.Int8Tensor.from_hp(given, granularity, mapping)
    held = {role: getattr(tensor, role, None) for role in ("qdata", "scale", "zero_point")}
    packed = packed_of({role: one for role, one in held.items() if one is not None}, kind)
    made_here = {"int8-rows": {}, "int8-groups": {"group_size": 16}, "fp8-rows": {}}
    return Held(packed, {to: partial(tensor.dequantize, to) for to in HALVES}, given, made_here.get(kind))


LIBRARIES: Mapping[str, Callable[[], Cases]] = {  # by the name of the codec
    "bnb4": bitsandbytes4,
    "bnb8": bitsandbytes8,
    "fp8_block": lambda: (*fp8_of_transformers(), *compressed_tensors("float-quantized")),
    "mxfp4": mxfp4_of_transformers,
    "pack-quantized": partial(compressed_tensors, "pack-quantized"),
    "int-quantized": partial(compressed_tensors, "int-quantized"),
    "nvfp4-pack-quantized": partial(compressed_tensors, "nvfp4-pack-quantized"),
    "mxfp4-pack-quantized": partial(compressed_tensors, "mxfp4-pack-quantized"),
    "torchao-int8": partial(torchao, "int8-rows", "int8-groups", "int8-uneven"),
    "torchao-fp8": partial(torchao, "fp8-rows", "fp8-one"),
}
CASES = [
    pytest.param(codec, case, id=f"{codec}-{name}") for codec, cases in LIBRARIES.items() for name, case in cases()
]
