"""4-bit and 8-bit weights of bitsandbytes: decoded to its bits, and quantized to its codes."""

import bitsandbytes.functional as bnb
import pytest
import torch
from bitsandbytes.nn import Int8Params, Linear4bit
from torch import Tensor

from surgery.codecs import packed_of
from surgery.codecs.bnb4 import Bnb4
from surgery.codecs.bnb8 import Bnb8
from surgery.core.codec import Packed

HALVES = (torch.float32, torch.bfloat16, torch.float16)
BLOCKSIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
each_dtype = pytest.mark.parametrize("dtype", HALVES, ids=str)
each_kind = pytest.mark.parametrize("kind", ["nf4", "fp4"])
each_nesting = pytest.mark.parametrize("double_quant", [False, True], ids=["single", "double"])
each_blocksize = pytest.mark.parametrize("blocksize", BLOCKSIZES)


@pytest.fixture(autouse=True)
def eager():
    """What bitsandbytes compiles for odd shapes gives the same uncompiled, sooner."""
    with torch.compiler.set_stance("force_eager"):
        yield


def weight(rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    drawn = torch.Generator().manual_seed(columns)
    found = torch.randn(rows, columns, generator=drawn) * torch.rand(rows, 1, generator=drawn)
    found[0, 0], found[1] = 40.0, 0.0
    return found.to(dtype)


def same(left: Tensor, right: Tensor) -> bool:
    """To the bit, the sign of zeros included."""
    octets = (one.contiguous().flatten().view(torch.uint8) for one in (left, right))
    return (left.dtype, left.shape) == (right.dtype, right.shape) and torch.equal(*octets)


def packed(values: Tensor, state: bnb.QuantState) -> Packed:
    """As a file has it."""
    held = {f"weight.{key}": one for key, one in state.as_dict(packed=True).items()}
    return packed_of({"weight": values, **held}, "a test")


@each_dtype
@each_blocksize
@each_nesting
@each_kind
def test_4_bit_weights_are_decoded_to_the_bits_of_bitsandbytes(kind, double_quant, blocksize, dtype):
    for shape in ((48, 7), (64, 1024)):
        values, state = bnb.quantize_4bit(weight(*shape, dtype), None, None, blocksize, double_quant, kind)
        held = packed(values, state)
        assert same(Bnb4().decode(held, dtype), bnb.dequantize_4bit(values, state))
        for other in HALVES:  # as a forward in this dtype decodes it
            state.dtype = other
            assert same(Bnb4().decode(held, other), bnb.dequantize_4bit(values, state))
        assert Bnb4().dtype(held.settings) == dtype


@each_dtype
@pytest.mark.parametrize("shape", [(33, 48), (64, 32), (4, 96)], ids=str)
def test_blocks_run_over_the_ends_of_rows(shape, dtype):
    """By bitsandbytes' own torch code: its kernel for CPUs with AVX512 takes the scales of other blocks there."""
    from bitsandbytes.backends.default.ops import _dequantize_4bit_compute

    given = weight(*shape, dtype)
    values, state = bnb.quantize_4bit(given, None, None, 64, False, "nf4")
    wanted = _dequantize_4bit_compute(values.flatten(), state.absmax, state.code, 64, shape, dtype)
    assert same(Bnb4().decode(packed(values, state), dtype), wanted)
    step = (state.code[1:] - state.code[:-1]).max() / 2
    assert bool(((wanted.float() - given.float()).abs() <= 1.01 * step * state.absmax.max()).all())


@pytest.mark.parametrize("storage", [torch.uint8, torch.bfloat16, torch.float16, torch.float32], ids=str)
@each_nesting
def test_the_dtype_of_the_storage_says_nothing_of_the_codes(storage, double_quant):
    given = weight(24, 64, torch.bfloat16)
    values, state = bnb.quantize_4bit(given, None, None, 64, double_quant, "nf4", storage)
    assert same(Bnb4().decode(packed(values, state), torch.bfloat16), bnb.dequantize_4bit(values, state))


@each_kind
def test_the_first_of_two_codes_is_the_high_half_of_the_byte(kind):
    given = torch.zeros(1, 64)
    given[0, 0], given[0, 1] = 1.0, -1.0
    values, state = bnb.quantize_4bit(given, None, None, 64, False, kind)
    assert Bnb4().decode(packed(values, state), torch.float32)[0, :2].tolist() == [1.0, -1.0]


@each_dtype
@each_blocksize
@each_kind
def test_fresh_4_bit_weights_have_the_codes_and_scales_of_bitsandbytes(kind, blocksize, dtype):
    for shape in ((96, 130), (48, 7)):
        given = weight(*shape, dtype)
        values, state = bnb.quantize_4bit(given, None, None, blocksize, False, kind)
        fresh = Bnb4().fresh(given, {"quant_type": kind, "blocksize": blocksize})
        wanted = packed(values, state)
        for role, one in wanted.tensors.items():
            if "quant_state" not in role:
                assert same(fresh.tensors[role], one), role
        assert {**fresh.settings, "shape": list(shape)} == wanted.settings


@each_kind
def test_fresh_double_quantization_has_the_scales_of_bitsandbytes_but_for_ties_and_the_order_of_its_sum(kind):
    given = weight(256, 1024, torch.bfloat16)
    values, state = bnb.quantize_4bit(given, None, None, 64, True, kind)
    fresh, wanted = Bnb4().fresh(given, {"quant_type": kind, "double_quant": True}), packed(values, state)
    assert same(fresh.tensors["weight"], wanted.tensors["weight"])
    offset = wanted.settings["nested_offset"]
    blocks = given.numel() // 64
    assert abs(fresh.settings["nested_offset"] - offset) <= blocks * 2.0**-24 * offset  # a sum of them in float32
    apart = fresh.tensors["weight.absmax"].int() - wanted.tensors["weight.absmax"].int()
    assert apart.abs().max() <= 1  # its table of 8-bit codes is not exact near the middle of two
    assert apart.count_nonzero() <= blocks // 100


@each_dtype
def test_a_linear_layer_reads_what_is_written_anew(dtype):
    held = Bnb4().fresh(weight(32, 64, dtype), {"quant_type": "nf4", "double_quant": True})
    stats = {role.removeprefix("weight."): one for role, one in held.tensors.items() if role != "weight"}
    layer = Linear4bit(64, 32, bias=False, compute_dtype=dtype, quant_type="nf4")
    layer.weight = type(layer.weight).from_prequantized(held.tensors["weight"], stats, device="cpu")
    x = torch.eye(64, dtype=dtype).requires_grad_()  # gradients keep it off the kernels that round activations
    assert same(layer(x).T, Bnb4().decode(held, dtype))


def test_8_bit_weights_are_decoded_to_the_bits_of_bitsandbytes():
    every = torch.arange(-128, 128, dtype=torch.int8).repeat(40, 1)
    SCB = torch.rand(40, generator=torch.Generator().manual_seed(0)) * torch.logspace(-4, 4, 40)
    found = Bnb8().decode(Packed({"weight": every, "SCB": SCB}), torch.float32)
    assert same(found, bnb.int8_vectorwise_dequant(every, SCB))
    assert not same(found, every * SCB.unsqueeze(1) / 127)  # as some divide


@each_dtype
def test_fresh_8_bit_weights_have_the_codes_and_scales_of_bitsandbytes(dtype):
    given = weight(64, 96, dtype)
    held = Int8Params(given.clone(), requires_grad=False).to("cpu")
    fresh = Bnb8().fresh(given, {})
    rows = given.any(dim=1)  # of a row of zeros it divides by zero
    assert same(fresh.tensors["SCB"], held.SCB)
    assert same(fresh.tensors["weight"][rows], held.data[rows])
    assert not bool(Bnb8().decode(fresh, torch.float32)[~rows].any())
