"""4-bit and 8-bit weights of bitsandbytes, in what the table of codecs does not say of them."""

import bitsandbytes.functional as bnb
import pytest
import torch
from bitsandbytes.nn import Linear4bit
from codec_table import HALVES, same, weight
from torch import Tensor

from surgery.codecs import packed_of
from surgery.codecs.bnb4 import Bnb4
from surgery.codecs.bnb8 import Bnb8
from surgery.core.codec import Packed

each_dtype = pytest.mark.parametrize("dtype", HALVES, ids=str)
each_kind = pytest.mark.parametrize("kind", ["nf4", "fp4"])


@pytest.fixture(autouse=True)
def eager():
    """What bitsandbytes compiles for odd shapes gives the same uncompiled, sooner."""
    with torch.compiler.set_stance("force_eager"):
        yield


def packed(values: Tensor, state: bnb.QuantState) -> Packed:
    """As a file has it."""
    held = {f"weight.{key}": one for key, one in state.as_dict(packed=True).items()}
    return packed_of({"weight": values, **held}, "a test")


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


@each_kind
def test_the_first_of_two_codes_is_the_high_half_of_the_byte(kind):
    given = torch.zeros(1, 64)
    given[0, 0], given[0, 1] = 1.0, -1.0
    values, state = bnb.quantize_4bit(given, None, None, 64, False, kind)
    assert Bnb4().decode(packed(values, state), torch.float32)[0, :2].tolist() == [1.0, -1.0]


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


@each_dtype
def test_the_quant_state_tells_what_a_weight_was_in(dtype):
    values, state = bnb.quantize_4bit(weight(48, 7, dtype), None, None, 64, True, "nf4")
    assert Bnb4().dtype(packed(values, state).settings) == dtype


def test_8_bits_are_not_divided_by_127_as_some_do():
    every = torch.arange(-128, 128, dtype=torch.int8).repeat(40, 1)
    SCB = torch.rand(40, generator=torch.Generator().manual_seed(0)) * torch.logspace(-4, 4, 40)
    assert not same(Bnb8().decode(Packed({"weight": every, "SCB": SCB}), torch.float32), every * SCB.unsqueeze(1) / 127)


@each_dtype
def test_a_row_of_zeros_is_one_again_where_bitsandbytes_divides_by_zero(dtype):
    given = weight(64, 96, dtype)
    rows = given.any(dim=1)
    assert not bool(rows.all())
    assert not bool(Bnb8().decode(Bnb8().fresh(given, {}), torch.float32)[~rows].any())
