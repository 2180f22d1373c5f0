"""fp8 and mxfp4 weights as transformers holds them: decoded to its bits, and fp8 quantized to its codes."""

import warnings
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor
from transformers.integrations import finegrained_fp8, mxfp4

from surgery.codecs import packed_of
from surgery.codecs.fp8_block import Fp8Block
from surgery.codecs.mxfp4 import Mxfp4
from surgery.errors import FormatError

HALVES = (torch.float32, torch.bfloat16, torch.float16)
each_dtype = pytest.mark.parametrize("dtype", HALVES, ids=str)


def same(left: Tensor, right: Tensor) -> bool:
    """To the bit, the sign of zeros included; but for the bits of what is no number."""
    octets = (one.nan_to_num(7.0, torch.inf, -torch.inf).flatten().view(torch.uint8) for one in (left, right))
    return (left.dtype, left.shape) == (right.dtype, right.shape) and torch.equal(*octets)


def dequantized(weight: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    return finegrained_fp8.Fp8Dequantize(None)._dequantize_one(weight, scales, dtype)


@each_dtype
@pytest.mark.parametrize("scale", [torch.float32, torch.bfloat16, torch.uint8], ids=str)
@pytest.mark.parametrize("grid", [(2, 3), (1, 1), (256, 1), (1, 6), (256, 384)], ids=str)
@pytest.mark.parametrize("code", [torch.float8_e4m3fn, torch.float8_e5m2], ids=str)
def test_fp8_weights_are_decoded_to_the_bits_of_transformers(code, grid, scale, dtype):
    weight = torch.arange(256 * 384).to(torch.uint8).view(256, 384).view(code)
    drawn = torch.Generator().manual_seed(0)
    scales = torch.rand(grid, generator=drawn).mul(3).to(scale) if scale.is_floating_point else None
    if scales is None:
        scales = torch.randint(0, 256, grid, generator=drawn, dtype=torch.uint8)
    block = {"weight_block_size": [256 // grid[0], 384 // grid[1]]}
    packed = packed_of({"weight": weight, "weight_scale_inv": scales}, "a test", block)
    assert same(Fp8Block().decode(packed, dtype), dequantized(weight, scales, dtype))


@pytest.mark.parametrize("shape", [(128, 256), (256, 128)])
def test_fresh_fp8_weights_have_the_codes_and_scales_of_transformers(shape):
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0)) * torch.logspace(-4, 4, shape[1])
    weight[:128, :128] = 0
    config = SimpleNamespace(weight_block_size=(128, 128), scale_fmt="float")
    quantize = finegrained_fp8.Fp8Quantize(SimpleNamespace(quantization_config=config))
    wanted = quantize._quantize_one("weight", weight.bfloat16())
    fresh = Fp8Block().fresh(weight.bfloat16(), {})
    assert torch.equal(fresh.tensors["weight"].view(torch.uint8), wanted["weight"].view(torch.uint8))
    assert torch.equal(fresh.tensors["weight_scale_inv"], wanted["weight_scale_inv"])


def test_a_block_at_the_edge_is_cut_not_stretched():
    """192 rows in blocks of 128 are 128 and 64; by the scales' shape alone they would be 96 each."""
    weight = torch.ones(192, 128).to(torch.float8_e4m3fn)
    packed = packed_of({"weight": weight, "weight_scale_inv": torch.tensor([[1.0], [2.0]])}, "a test")
    assert Fp8Block().decode(packed, torch.float32)[:, 0].tolist() == [1.0] * 128 + [2.0] * 64


@pytest.mark.parametrize("config", [{}, {"weight_block_size": [128, 128]}])
def test_blocks_that_nothing_tells_or_that_contradict_what_is_told_are_refused(config):
    """3 x 5 scales of 48 x 70 codes are blocks of 16 x 16, of 16 x 14, and of others."""
    tensors = {"weight": torch.ones(48, 70).to(torch.float8_e4m3fn), "weight_scale_inv": torch.ones(3, 5)}
    with pytest.raises(FormatError, match="is weight_block_size of config"):
        packed_of(tensors, "a test", config)


@each_dtype
def test_mxfp4_weights_are_decoded_to_the_bits_of_transformers(dtype):
    blocks = torch.arange(8 * 16).to(torch.uint8).view(8, 16).repeat(256, 2, 1).view(2, 256, 8, 16).contiguous()
    scales = torch.arange(256, dtype=torch.uint8).view(1, 256, 1).repeat(2, 1, 8)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of a resized `out`
        wanted = mxfp4._convert_moe_packed_tensors(blocks, scales, dtype=dtype)
    found = Mxfp4().decode(packed_of({"blocks": blocks, "scales": scales}, "a test"), dtype)
    assert same(found, wanted)
    assert found.shape == (2, 256, 256)  # [expert, in, out]


def test_the_first_of_two_mxfp4_codes_is_the_low_half_of_the_byte():
    blocks = torch.full((1, 1, 1, 16), 0x21, dtype=torch.uint8)
    packed = packed_of({"blocks": blocks, "scales": torch.full((1, 1, 1), 127, dtype=torch.uint8)}, "a test")
    assert Mxfp4().decode(packed, torch.float32).flatten()[:2].tolist() == [0.5, 1.0]
