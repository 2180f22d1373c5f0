"""Every codec: what is decoded and encoded again has the same bytes, whole or by rows, and float64 is rounded once."""

import json
from collections.abc import Mapping

import pytest
import torch
from rational import nearest_even, same_bits
from torch import Tensor

from surgery.codecs import CODECS, FORMS, codec_of, cut, packed_of
from surgery.codecs.bnb4 import Bnb4
from surgery.codecs.bnb8 import Bnb8
from surgery.codecs.compressed_ints import IntQuantized, PackQuantized
from surgery.codecs.fp8_block import Fp8Block
from surgery.codecs.mxfp4 import Mxfp4
from surgery.codecs.nvfp4 import Nvfp4
from surgery.codecs.torchao import TorchaoFp8, TorchaoInt8
from surgery.core.codec import Codec, Packed, as_stored, differs
from surgery.errors import ConfigError, FormatError, ValueRangeError

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


def test_float64_is_rounded_to_fp8_once() -> None:
    """By way of float32 a value just above the middle of two codes becomes the middle, and then the even code."""
    ones = {"weight": torch.ones(1, 2).to(torch.float8_e4m3fn), "weight_scale_inv": torch.ones(1, 1)}
    like = packed_of(ones, "ones")
    above = torch.tensor([[1 + 2.0**-4 + 2.0**-40, -1 - 2.0**-4 - 2.0**-40]], dtype=torch.float64)
    found = Fp8Block().decode(Fp8Block().encode(above, like), torch.float32)
    assert found.tolist() == [[1.125, -1.125]]


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
    "torchao-int8": torchao_int8(),
    "torchao-fp8": torchao_fp8(),
}
CASES = [pytest.param(codec, name, id=f"{codec.name}-{name}") for codec in CODECS for name in EXAMPLES[codec.name]]


def same(left: Packed, right: Packed) -> bool:
    return (
        left.tensors.keys() == right.tensors.keys()
        and all(same_bits(left.tensors[role], right.tensors[role]) for role in right.tensors)
        and left.settings == right.settings
    )


def copied(packed: Packed) -> Packed:
    return Packed({role: values.clone() for role, values in packed.tensors.items()}, dict(packed.settings))


@pytest.mark.parametrize(("codec", "name"), CASES)
def test_what_it_claims_is_given_to_it(codec: Codec, name: str):
    assert codec_of(EXAMPLES[codec.name][name], "a test") is codec


@pytest.mark.parametrize(("codec", "name"), CASES)
def test_encode_of_decode_has_the_same_bytes(codec: Codec, name: str):
    packed = EXAMPLES[codec.name][name]
    assert same(codec.encode(codec.decode(packed, torch.float64), like=packed), packed)
    if all(values.dtype != torch.float64 for values in packed.tensors.values()):
        assert same(codec.encode(codec.decode(packed, torch.float32), like=packed), packed)


@pytest.mark.parametrize(("codec", "name"), CASES)
def test_decode_gives_the_dtype_asked_for_in_fresh_memory(codec: Codec, name: str):
    packed = EXAMPLES[codec.name][name]
    before = copied(packed)
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        decoded = codec.decode(packed, dtype)
        assert decoded.dtype == dtype
        decoded.fill_(7)
        assert same(packed, before)


@pytest.mark.parametrize(("codec", "name"), CASES)
def test_encode_changes_neither_the_weight_nor_the_likeness(codec: Codec, name: str):
    packed = EXAMPLES[codec.name][name]
    before, weight = copied(packed), codec.decode(packed, torch.float64) + 0.1
    given = weight.clone()
    codec.encode(weight, like=packed)
    assert same_bits(weight, given)
    assert same(packed, before)


@pytest.mark.parametrize("size", [1, 3, 5])
@pytest.mark.parametrize(("codec", "name"), CASES)
def test_rows_are_decoded_from_their_own_spans_and_encoded_into_them(codec: Codec, name: str, size: int):
    packed = EXAMPLES[codec.name][name]
    whole, shape = codec.decode(packed, torch.float64), codec.shape(packed.headers, packed.settings)
    assert tuple(whole.shape) == shape
    for start in range(0, shape[0] if len(shape) > 1 else 0, size):
        part = cut(codec, packed, slice(start, min(start + size, shape[0])))
        decoded = codec.decode(part, torch.float64)
        assert same_bits(decoded, whole[start : start + size])
        assert same(codec.encode(decoded, like=part), part)
        below, above = codec.grid(part)
        assert below.shape == above.shape == decoded.shape


@pytest.mark.parametrize(("codec", "name"), CASES)
def test_rows_of_the_step_share_no_code_with_their_neighbours(codec: Codec, name: str):
    packed = EXAMPLES[codec.name][name]
    shape, step = (told(packed.headers, packed.settings) for told in (codec.shape, codec.step))
    role = next(iter(codec.endings))
    if len(shape) > 1:
        starts = range(0, shape[0], step)
        parts = [cut(codec, packed, slice(at, min(at + step, shape[0]))).tensors[role] for at in starts]
        whole = torch.cat(parts) if parts else packed.tensors[role]
        assert same_bits(whole, packed.tensors[role])


@pytest.mark.parametrize(("codec", "name"), CASES)
def test_the_grid_is_the_next_values_that_can_be_held(codec: Codec, name: str):
    packed = EXAMPLES[codec.name][name]
    weight = codec.decode(packed, torch.float64)
    finite = weight.isfinite()
    for neighbour, sign in zip(codec.grid(packed), (-1, 1), strict=True):
        assert bool((sign * (neighbour - weight)[finite] >= 0).all())
        held = torch.where(finite & neighbour.isfinite(), neighbour, weight)
        assert not bool(differs(codec.decode(codec.encode(held, like=packed), torch.float64), held).any())
        near = torch.where(finite, weight + 0.4 * (held - weight), weight)  # rounds to where it was
        assert not bool(differs(codec.decode(codec.encode(near, like=packed), torch.float64), weight).any())


@pytest.mark.parametrize(("codec", "name"), CASES)
def test_settings_are_read_from_the_tensors(codec: Codec, name: str):
    packed = EXAMPLES[codec.name][name]
    if codec.name != "plain" and name != "rows-of-experts":  # which no file holds
        assert same(packed_of(packed.tensors, "a test", packed.settings), packed)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_plain_rounds_float64_once(dtype):
    step = 2.0 ** (1 - HALVES[dtype])  # between 1 and 2
    ties = 1 + step * (torch.arange(8, dtype=torch.float64) + 0.5)
    acc = torch.cat([ties, ties * (1 + 2.0**-40), ties * (1 - 2.0**-40)])
    wanted = [nearest_even(value, dtype) for value in acc.tolist()]
    plain_codec = next(codec for codec in CODECS if codec.name == "plain")
    found = plain_codec.encode(acc, like=Packed({"weight": torch.zeros(24, dtype=dtype)})).tensors["weight"]
    assert found.dtype == dtype
    assert found.tolist() == wanted
    assert acc.to(dtype).tolist() != wanted  # torch alone rounds twice


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.bool, torch.int64], ids=str)
def test_what_no_codec_claims_is_refused_by_name(dtype):
    with pytest.raises(FormatError, match=r"layers\.0"):
        codec_of(Packed({"weight": torch.zeros(2, 2, dtype=dtype)}), "layers.0")
    with pytest.raises(FormatError, match=r"layers\.0"):
        codec_of(Packed({"bias": torch.zeros(2)}), "layers.0")


def state(**fields: object) -> Tensor:
    """A quant state with other fields."""
    told = {"quant_type": "nf4", "blocksize": 64, "dtype": "float32", "shape": [12, 64], **fields}
    return torch.frombuffer(bytearray(json.dumps(told).encode()), dtype=torch.uint8)


NF4 = "weight.quant_state.bitsandbytes__nf4"
DAMAGED = {
    "a stale state": ({NF4: state(shape=[12, 65])}, "weight has 384 elements; 390 are wanted"),
    "a merged weight": ({"weight": torch.zeros(12, 64)}, "weight has 768 elements; 96 are wanted"),
    "no scales": ({"weight.absmax": None}, "weight.absmax is missing"),
    "no table": ({"weight.quant_map": None}, "weight.quant_map is missing"),
    "no state": ({NF4: None}, "no quant state beside its 4-bit codes"),
    "two states": ({NF4.replace("nf4", "fp4"): state()}, "fp4 and .*nf4 beside its 4-bit codes"),
    "fewer scales": ({"weight.absmax": torch.zeros(3)}, "weight.absmax"),
    "scales of whole numbers": ({"weight.absmax": torch.ones(12, dtype=torch.uint8)}, "weight.absmax is in uint8"),
    "scales that were cast": (
        {"weight.nested_absmax": torch.ones(1), "weight.nested_quant_map": torch.ones(256)},
        "weight.absmax is in float32",
    ),
    "a table that was cast": ({"weight.quant_map": torch.zeros(16).half()}, "weight.quant_map is in float16"),
    "a short table": ({"weight.quant_map": torch.zeros(15)}, "weight.quant_map"),
    "another kind": ({NF4: state(quant_type="fp4")}, "quant_type"),
    "no block": ({NF4: state(blocksize=0)}, "blocksize"),
    "a block that is true": ({NF4: state(blocksize=True)}, "blocksize"),
    "an unknown dtype": ({NF4: state(dtype="float")}, "dtype"),
    "a negative shape": ({NF4: state(shape=[-12, -64])}, "shape"),
    "no shape": ({NF4: state(shape=None)}, "shape"),
    "no JSON": ({NF4: torch.tensor([123], dtype=torch.uint8)}, "quant_type"),
    "a deep JSON": ({NF4: torch.full((4096,), ord("["), dtype=torch.uint8)}, "quant_type"),
    "a long JSON": ({NF4: torch.full((4097,), ord(" "), dtype=torch.uint8)}, "JSON"),
    "an offset that is none": (
        {
            "weight.absmax": torch.ones(12, dtype=torch.uint8),
            "weight.nested_absmax": torch.zeros(1),
            NF4: state(nested_blocksize=256),
        },
        "offset",
    ),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_a_4_bit_weight_that_contradicts_its_quant_state_is_refused(case: str):
    changed, told = DAMAGED[case]
    packed = Bnb4().fresh(weights(12, 64), {"quant_type": "nf4"})
    with pytest.raises(FormatError, match=rf"^layers\.0: .*{told}"):
        packed_of(with_changes(packed, changed), "layers.0")


def with_changes(packed: Packed, changed: Mapping[str, Tensor | None]) -> dict[str, Tensor]:
    """Its tensors, some of them others; those that are None are gone."""
    return {role: one for role, one in {**packed.tensors, **changed}.items() if one is not None}


@pytest.mark.parametrize(
    "changed",
    [
        {"SCB": None, "weight_format": torch.zeros((), dtype=torch.uint8)},
        {"SCB": torch.ones(11)},
        {"SCB": torch.ones(12).half()},
        {"weight_format": torch.tensor(3, dtype=torch.uint8)},
        {"weight_format": torch.zeros(9, dtype=torch.uint8)},
    ],
    ids=["no scales", "rows", "dtype", "layout", "layouts"],
)
def test_an_8_bit_weight_of_another_layout_is_refused(changed: Mapping[str, Tensor | None]):
    packed = Bnb8().fresh(weights(12, 64), {})
    with pytest.raises(FormatError, match=r"^layers\.0: .*8-bit"):
        packed_of(with_changes(packed, changed), "layers.0")


@pytest.mark.parametrize("wrong", [{"quant_type": "nf5"}, {"blocksize": 65}], ids=str)
def test_settings_that_no_4_bit_weight_can_have_are_refused(wrong: Mapping[str, object]):
    with pytest.raises(ConfigError, match="4-bit"):
        Bnb4().fresh(weights(12, 64), wrong)
    with pytest.raises(ConfigError, match="float64"):
        Bnb4().fresh(weights(12, 64).double(), {})


@pytest.mark.parametrize("form", FORMS)
def test_a_fresh_weight_of_any_form_is_near_and_encoding_it_again_changes_nothing(form: str):
    codec, settings = FORMS[form]
    weight = weights(160, 256, torch.bfloat16)
    packed = codec.fresh(weight, settings)
    decoded = codec.decode(packed, torch.float64)
    assert same(codec.encode(decoded, like=packed), packed)
    largest = weight.abs().double().amax(dim=1, keepdim=True)
    gap = 1 / 6  # half of the largest between two values of fp4, of the block's absmax
    gap *= 1 + 2.0**-4 if form == "nvfp4" else 1  # whose scale is rounded to three bits of mantissa
    nested = 0.9 / 128 * largest.max() if "double" in form else 0.0  # absmax is in 8 bits itself
    assert bool(((decoded - weight.double()).abs() <= (gap + 2.0**-8) * largest + nested).all())


@pytest.mark.parametrize("shape", [(160, 256), (11, 128), (3, 384)], ids=str)
@pytest.mark.parametrize("form", FORMS)
def test_a_fresh_weight_made_by_its_rows_has_the_bytes_of_the_whole(form: str, shape: tuple[int, int]):
    """Of rows that end within blocks, groups and words."""
    codec, settings = FORMS[form]
    settings = settings | {"blocksize": 4096} if codec.name == "bnb4" else settings
    weight = weights(*shape, torch.bfloat16)
    whole = codec.fresh(weight, settings)
    tiles = (weight[at : at + 5] for at in range(0, len(weight), 5))
    scales = codec.scales(tiles, shape, weight.dtype, settings)
    step, role = codec.step(scales.headers, scales.settings), next(iter(codec.endings))
    parts = []
    for at in range(0, len(weight), step):
        rows = slice(at, min(at + step, len(weight)))
        parts.append(codec.coded(weight[rows], cut(codec, scales, rows)).tensors[role])
    made = as_stored(scales._replace(tensors={**scales.tensors, role: torch.cat(parts)}))
    assert scales.tensors[role].is_meta
    assert same(made, whole)


def test_a_large_fresh_weight_is_made_of_parts_that_do_not_show():
    """4-bit codes are found some at a time."""
    weight = torch.randn(3, 1 << 19, generator=torch.Generator().manual_seed(0))
    whole = Bnb4().fresh(weight, {"blocksize": 4096})
    for row in range(3):
        part = Bnb4().fresh(weight[row : row + 1], {"blocksize": 4096})
        found = cut(Bnb4(), whole, slice(row, row + 1)).tensors
        assert same_bits(found["weight"], part.tensors["weight"])
        assert same_bits(found["weight.absmax"], part.tensors["weight.absmax"])


def test_an_8_bit_weight_beyond_float16_is_refused():
    with pytest.raises(ValueRangeError, match="float16"):
        Bnb8().fresh(weights(12, 64) * 1e4, {})


F8 = torch.ones(150, 200).to(torch.float8_e4m3fn)
LAYOUTS = {
    "other blocks": {"weight": F8, "weight_scale_inv": torch.ones(7, 7)},
    "no blocks": {"weight": F8, "weight_scale_inv": torch.ones(0, 2)},
    "a stack": {"weight": F8.view(3, 50, 200), "weight_scale_inv": torch.ones(3, 1, 2)},
    "scales of inputs that are none": {"weight": F8, "weight_scale": torch.ones(1), "input_scale": torch.ones(201)},
    "scales of whole numbers": {"weight": F8, "weight_scale": torch.ones(150, dtype=torch.int32)},
    "blocks of 8": {"blocks": torch.zeros(2, 3, 4, 8).byte(), "scales": torch.zeros(2, 3, 4).byte()},
    "no experts": {"blocks": torch.zeros(3, 4, 16).byte(), "scales": torch.zeros(3, 4).byte()},
    "more scales": {"blocks": torch.zeros(2, 3, 4, 16).byte(), "scales": torch.zeros(2, 3, 5).byte()},
}


@pytest.mark.parametrize("case", LAYOUTS)
def test_an_fp8_or_mxfp4_weight_of_another_layout_is_refused(case: str):
    with pytest.raises(FormatError, match=r"^layers\.0: (fp8|mxfp4) "):
        packed_of(LAYOUTS[case], "layers.0", {"weight_block_size": [128, "x"]})


def test_fresh_weights_of_other_shapes_are_refused():
    with pytest.raises(ConfigError, match="fp8"):
        Fp8Block().fresh(torch.ones(2, 2, 2), {})
    with pytest.raises(ConfigError, match="mxfp4"):
        Mxfp4().fresh(torch.ones(2, 33, 2), {})
    for codec, wrong in ((PackQuantized(), {"group_size": 7}), (IntQuantized(), {"num_bits": 3})):
        with pytest.raises(ConfigError, match=r"int\d"):
            codec.fresh(torch.ones(2, 32), wrong)
    with pytest.raises(ConfigError, match="nvfp4"):
        Nvfp4().fresh(torch.ones(2, 24), {})
