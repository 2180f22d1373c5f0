"""Every codec: what is decoded and encoded again has the same bytes, whole or by rows, and float64 is rounded once."""

import pytest
import torch
from codec_examples import CASES, EXAMPLES, HALVES, weights
from rational import nearest_even, same_bits

from surgery.codecs import CODECS, FORMS, codec_of, cut, packed_of
from surgery.codecs.bnb4 import Bnb4
from surgery.codecs.fp8_block import Fp8Block
from surgery.core.codec import Codec, Packed, as_stored, differs


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


def test_float64_is_rounded_to_fp8_once() -> None:
    """By way of float32 a value just above the middle of two codes becomes the middle, and then the even code."""
    ones = {"weight": torch.ones(1, 2).to(torch.float8_e4m3fn), "weight_scale_inv": torch.ones(1, 1)}
    like = packed_of(ones, "ones")
    above = torch.tensor([[1 + 2.0**-4 + 2.0**-40, -1 - 2.0**-4 - 2.0**-40]], dtype=torch.float64)
    found = Fp8Block().decode(Fp8Block().encode(above, like), torch.float32)
    assert found.tolist() == [[1.125, -1.125]]


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


@pytest.mark.parametrize("form", FORMS)
def test_a_fresh_weight_of_any_form_is_near_and_encoding_it_again_changes_nothing(form: str):
    codec, settings = FORMS[form]
    weight = weights(160, 256, torch.bfloat16)
    packed = codec.fresh(weight, settings)
    decoded = codec.decode(packed, torch.float64)
    assert same(codec.encode(decoded, like=packed), packed)
    largest = weight.abs().double().amax(dim=1, keepdim=True)
    gap = 1 / 5 if form == "mxfp4a16" else 1 / 6  # half of the largest between two values of fp4, of the largest there
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
