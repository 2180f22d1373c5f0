"""Every codec: what is decoded and encoded again has the same bytes, and float64 is rounded once."""

from collections.abc import Mapping

import pytest
import torch
from rational import nearest_even, same_bits
from torch import Tensor

from surgery.codecs import CODECS, codec_of
from surgery.core.codec import Codec, Packed
from surgery.errors import FormatError

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


EXAMPLES = {"plain": plain()}  # by codec: what it claims
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
