"""Every codec beside the library of its format: decoded to its bits, encoded to its bytes, fresh as it makes them."""

from collections.abc import Callable, Iterator

import pytest
import torch
from codec_table import CASES, LIBRARIES, Held, same
from torch import Tensor

from surgery.codecs import CODECS, codec_of, cut
from surgery.core.codec import Codec, Packed, as_stored

STATE = "quant_state"


@pytest.fixture(autouse=True)
def eager() -> Iterator[None]:
    """What bitsandbytes compiles for odd shapes gives the same uncompiled, sooner."""
    with torch.compiler.set_stance("force_eager"):
        yield


def same_numbers(left: Tensor, right: Tensor) -> bool:
    """To the bit, but for the bits of what is no number."""
    numbers = (torch.where(one.isnan(), torch.zeros_like(one), one) for one in (left, right))
    return torch.equal(left.isnan(), right.isnan()) and same(*numbers)


def test_every_codec_has_a_line_in_the_table() -> None:
    assert {*LIBRARIES} == {codec.name for codec in CODECS} - {"plain"}


@pytest.mark.filterwarnings("ignore:An output with one or more elements was resized")
@pytest.mark.parametrize(("name", "make"), CASES)
def test_a_weight_is_read_and_made_to_the_bits_of_the_library_of_its_format(
    name: str, make: Callable[[], Held]
) -> None:
    held = make()
    codec = codec_of(held.packed, name)
    assert codec.name == name
    assert codec.dtype(held.packed.settings) in {None, *held.decoded} or not held.decoded
    for dtype, decode in held.decoded.items():
        decodes(codec, held.packed, dtype, decode())
    for dtype in (torch.float64, torch.float32):
        assert alike(codec.encode(codec.decode(held.packed, dtype), like=held.packed), held.packed)
    if held.weight is not None:
        comes_as_near(codec, held.packed, held.weight)
    if held.weight is not None and held.fresh is not None:
        fresh = as_stored(codec.fresh(held.weight, held.fresh))
        assert fresh.settings == held.packed.settings
        assert alike(fresh, held.packed)


def decodes(codec: Codec, packed: Packed, dtype: torch.dtype, wanted: Tensor) -> None:
    """To what is wanted, whole and by rows."""
    assert same_numbers(codec.decode(packed, dtype), wanted)
    assert codec.shape(packed.headers, packed.settings) == tuple(wanted.shape)
    parts = (slice(at, min(at + 5, len(wanted))) for at in range(0, len(wanted), 5))
    assert same_numbers(torch.cat([codec.decode(cut(codec, packed, rows), dtype) for rows in parts]), wanted)


def comes_as_near(codec: Codec, packed: Packed, weight: Tensor) -> None:
    """By the library's scales the nearest; a tie, or what its dtype rounds on the way, may fall otherwise there.

    What a code stands for, times its scale, is rounded to float32.
    """
    found = codec.decode(codec.encode(weight.double(), like=packed), torch.float64)
    apart, theirs = ((one - weight.double()).abs() for one in (found, codec.decode(packed, torch.float64)))
    eps, single = torch.finfo(weight.dtype).eps, torch.finfo(torch.float32)
    assert bool((apart <= theirs * (1 + 4 * eps) + single.eps * found.abs() + single.tiny).all())


def alike(found: Packed, wanted: Packed) -> bool:
    """All tensors to the byte, but for the spelling of a quant state, which the settings have."""
    same_roles = found.tensors.keys() == wanted.tensors.keys()
    return same_roles and all(
        same(found.tensors[role], one) for role, one in wanted.tensors.items() if STATE not in role
    )
