"""Weights that compressed-tensors has compressed: decoded to its bits, encoded to the same bytes, fresh as it does."""

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from surgery.codecs import codec_of, cut, packed_of
from surgery.codecs.compressed_config import refuse_unsupported
from surgery.core.codec import Packed
from surgery.errors import FormatError

sys.path.insert(0, str(Path(__file__).with_name("golden")))
import compressed_tensors_weights as made

GOLDEN = {f"{case}-{dtype}": (case, one) for case, dtype, one in made.read()}
each_golden = pytest.mark.parametrize("name", GOLDEN)
# What stands for settings of `fresh` in the configs; others have codes that are not made here so.
FRESH = [
    case for case, (form, told) in made.CASES.items() if told["strategy"] in {"group", "channel"} and "fp8" not in case
]


def same(left: Tensor, right: Tensor) -> bool:
    octets = (one.contiguous().flatten().view(torch.uint8) for one in (left, right))
    return (left.dtype, left.shape) == (right.dtype, right.shape) and torch.equal(*octets)


def packed(name: str) -> Packed:
    case, one = GOLDEN[name]
    return packed_of(one.held, name, made.quantization_config(case))


@each_golden
def test_it_is_decoded_to_the_bits_of_compressed_tensors(name: str):
    held, wanted = packed(name), GOLDEN[name][1].decompressed
    codec = codec_of(held, name)
    assert same(codec.decode(held, wanted.dtype), wanted)
    assert codec.dtype(held.settings) in {None, wanted.dtype}  # None: what config.json says of the model
    assert codec.shape(held.headers, held.settings) == tuple(wanted.shape)
    found = torch.cat([codec.decode(cut(codec, held, slice(at, at + 5)), wanted.dtype) for at in (0, 5, 10)])
    assert same(found, wanted)


@each_golden
def test_what_is_decoded_is_encoded_to_the_same_bytes(name: str):
    held = packed(name)
    codec = codec_of(held, name)
    for dtype in (torch.float64, torch.float32):
        again = codec.encode(codec.decode(held, dtype), like=held)
        assert all(same(again.tensors[role], one) for role, one in held.tensors.items())


@each_golden
def test_the_weight_itself_is_encoded_to_the_codes_of_compressed_tensors(name: str):
    """It takes the nearest by its own scales; a tie, or what its dtype rounds on the way, may fall otherwise."""
    held, weight = packed(name), GOLDEN[name][1].weight
    codec = codec_of(held, name)
    found = codec.decode(codec.encode(weight.double(), like=held), torch.float64)
    apart, theirs = ((one - weight.double()).abs() for one in (found, codec.decode(held, torch.float64)))
    eps = torch.finfo(weight.dtype).eps
    assert bool((apart <= theirs * (1 + 4 * eps) + torch.finfo(torch.float32).tiny).all())


@pytest.mark.parametrize("dtype", made.DTYPES)
@pytest.mark.parametrize("case", [*FRESH, "nvfp4"])
def test_a_fresh_weight_has_the_codes_and_scales_of_compressed_tensors(case: str, dtype: str):
    held, weight = packed(f"{case}-{dtype}"), GOLDEN[f"{case}-{dtype}"][1].weight
    told = {"group_size": -1, **made.CASES[case][1]}
    found = codec_of(held, case).fresh(weight, told)
    assert found.settings == held.settings
    assert found.tensors.keys() == held.tensors.keys()
    for role, one in held.tensors.items():
        assert same(found.tensors[role], one), role


@pytest.mark.slow
def test_the_golden_file_is_what_the_library_makes_now():
    pytest.importorskip("compressed_tensors")
    for case, dtype, before in made.read():
        now = made.golden(case, made.DTYPES[dtype])
        assert now.held.keys() == before.held.keys()
        assert all(same(now.held[role], one) for role, one in before.held.items())
        assert same(now.decompressed, before.decompressed)


UNSUPPORTED: Mapping[str, tuple[dict[str, Any], str]] = {
    "sparse": ({"sparsity_config": {"format": "sparse-24-bitmask"}}, "sparsity sparse-24-bitmask"),
    "marlin": ({"format": "marlin-24"}, "format marlin-24"),
    "mxfp4": ({"format": "mxfp4-pack-quantized"}, "format mxfp4-pack-quantized"),
    "cache": ({"kv_cache_scheme": {"num_bits": 8, "type": "float"}}, "KV cache"),
    "rotated": ({"transform_config": {"config_groups": {"R1": {}}}}, "rotation"),
    "not packed yet": ({"quantization_status": "frozen"}, "quantization_status frozen"),
    "activations alone": ({"config_groups": {"group_0": {"weights": None}}}, "activations alone"),
    "out of order": ({"config_groups": {"group_0": {"weights": {"actorder": "group"}}}}, "actorder group"),
    "what is no format": ({"format": {"a": []}}, "format"),
    "what is no order": ({"sparsity_config": {"format": ["a"]}}, "sparsity"),
    "one group's format": ({"config_groups": {"g": {"format": "mxfp8-quantized", "weights": {}}}}, "mxfp8-quantized"),
}


@pytest.mark.parametrize("case", UNSUPPORTED)
def test_what_no_codec_does_is_refused_by_name(case: str):
    told, why = UNSUPPORTED[case]
    config = made.quantization_config("w4a16")
    refuse_unsupported(config)
    with pytest.raises(FormatError, match=f"{why}.*not supported; load it with transformers"):
        refuse_unsupported(config | json.loads(json.dumps(told)))


DAMAGED = {
    "columns out of order": ("w4a16", {"weight_g_idx": torch.zeros(64, dtype=torch.int32)}, "actorder"),
    "another shape": ("w4a16", {"weight_shape": torch.tensor([12, 80])}, "packed codes"),
    "a shape of no matrix": ("w4a16", {"weight_shape": torch.tensor([12])}, "packed codes"),
    "a shape of floats": ("w4a16", {"weight_shape": torch.tensor([12.0, 64.0])}, "packed codes"),
    "a shape of nothing": (
        "w4a16",
        {"weight_shape": torch.tensor([0, 64]), "weight_packed": torch.zeros(0, 8, dtype=torch.int32)},
        "scales",
    ),
    "codes of no matrix": ("w4a16", {"weight_packed": torch.zeros(8, dtype=torch.int32)}, "packed codes"),
    "fewer scales": ("w4a16", {"weight_scale": torch.ones(12, 3)}, "scales"),
    "scales of other rows": ("w8a8", {"weight_scale": torch.ones(11, 1)}, "scales"),
    "scales of whole numbers": ("w8a8", {"weight_scale": torch.ones(12, 1, dtype=torch.int32)}, "scales"),
    "other zero points": ("w8a8-asymmetric", {"weight_zero_point": torch.ones(3, 1, dtype=torch.int8)}, "zero points"),
    "fp8 with zero points": ("fp8", {"weight_zero_point": torch.zeros(12, 1)}, "weight_zero_point"),
    "nvfp4 in other blocks": ("nvfp4", {"weight_scale": torch.ones(12, 2).to(torch.float8_e4m3fn)}, "nvfp4"),
    "nvfp4 of nothing": ("nvfp4", {"weight_packed": torch.zeros(0, 32).byte()}, "nvfp4"),
    "nvfp4 of no matrix": ("nvfp4", {"weight_packed": torch.zeros(32).byte()}, "nvfp4"),
    "nvfp4 with scales for all rows": ("nvfp4", {"weight_global_scale": torch.ones(12)}, "nvfp4"),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_a_layout_that_is_another_is_refused_by_name(case: str):
    golden, changed, why = DAMAGED[case]
    tensors = {**GOLDEN[f"{golden}-bfloat16"][1].held, **changed}
    with pytest.raises(FormatError, match=rf"^layers\.0: .*{why}"):
        packed_of(tensors, "layers.0", made.quantization_config(golden))


@pytest.mark.parametrize("bits", [[4], {}, "8", 3, [8, 4]], ids=str)
def test_bits_of_codes_in_bytes_that_are_none_are_refused(bits: object):
    config = made.quantization_config("w8a8")
    config["config_groups"]["group_0"] = {"weights": {"num_bits": bits}}
    with pytest.raises(FormatError, match=r"^a test: .*bits"):
        packed_of(GOLDEN["w8a8-bfloat16"][1].held, "a test", config)


def test_bits_that_neither_the_shapes_nor_the_config_tell_are_refused():
    """Four columns fill one word in 4 bits and in 8."""
    tensors = {
        "weight_packed": torch.zeros(2, 1, dtype=torch.int32),
        "weight_scale": torch.ones(2, 1),
        "weight_shape": torch.tensor([2, 4]),
    }
    assert packed_of(tensors, "a test", made.quantization_config("w4a16")).settings["num_bits"] == 4
    with pytest.raises(FormatError, match="packed codes"):
        packed_of(tensors, "a test")
