"""Weights that compressed-tensors has compressed: what is refused of them, and whether their golden file is right."""

import json
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from codec_table import made, same

from surgery.codecs import packed_of
from surgery.codecs.compressed_config import refuse_unsupported
from surgery.codecs.fp8_rows import Fp8Rows
from surgery.codecs.mxfp4_packed import Mxfp4Packed
from surgery.errors import FormatError

GOLDEN = {f"{case}-{dtype}": one for case, dtype, one in made.read()}


@pytest.mark.slow
def test_the_golden_file_is_what_the_library_makes_now():
    pytest.importorskip("compressed_tensors")
    for case, dtype, before in made.read():
        now = made.golden(case, made.DTYPES[dtype])
        assert now.held.keys() == before.held.keys()
        assert all(same(now.held[role], one) for role, one in before.held.items())
        assert same(now.decompressed, before.decompressed)


@pytest.mark.parametrize("dtype", made.DTYPES)
def test_fp8_by_rows_is_made_as_the_library_makes_it(dtype: str):
    golden = GOLDEN[f"fp8-{dtype}"]
    fresh = Fp8Rows().fresh(golden.weight, {})
    assert fresh.tensors.keys() == golden.held.keys()
    assert all(same(fresh.tensors[role], one) for role, one in golden.held.items())
    assert fresh.settings == packed_of(golden.held, "fp8", made.quantization_config("fp8")).settings


RANGES = {torch.float32: (-133, 127), torch.bfloat16: (-133, 127), torch.float16: (-24, 15)}


@pytest.mark.parametrize("dtype", RANGES, ids=str)
def test_mxfp4_is_made_as_the_library_makes_it_whatever_the_largest_of_a_block(dtype: torch.dtype):
    """Blocks of every exponent and 64 mantissas, subnormal and of zeros too, up to where its scales go round."""
    pytest.importorskip("compressed_tensors")
    first, last = RANGES[dtype]
    largest = torch.cat([(torch.arange(64, dtype=torch.float64) / 64 + 1) * 2.0**e for e in range(first, last + 1)])
    largest = torch.cat([torch.zeros(1), largest[largest < 1.75 * 2.0**last]]).to(dtype)
    drawn = torch.rand(len(largest), 32, generator=torch.Generator().manual_seed(0)).mul(2).sub(1).to(dtype)
    drawn[:, 0] = 1
    now = made.compressed("mxfp4", drawn * largest.unsqueeze(1))
    fresh = Mxfp4Packed().fresh(now.weight, {})
    assert all(same(fresh.tensors[role], one) for role, one in now.held.items())
    assert same(Mxfp4Packed().decode(fresh, torch.bfloat16), now.decompressed)


UNSUPPORTED: Mapping[str, tuple[dict[str, Any], str]] = {
    "sparse": ({"sparsity_config": {"format": "sparse-24-bitmask"}}, "sparsity sparse-24-bitmask"),
    "marlin": ({"format": "marlin-24"}, "format marlin-24"),
    "mxfp6": ({"format": "mxfp6-pack-quantized"}, "format mxfp6-pack-quantized"),
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
    "mxfp4 in other blocks": ("mxfp4", {"weight_scale": torch.ones(12, 4).byte()}, "mxfp4"),
    "mxfp4 of nothing": ("mxfp4", {"weight_packed": torch.zeros(0, 32).byte()}, "mxfp4"),
    "mxfp4 of no matrix": ("mxfp4", {"weight_packed": torch.zeros(32).byte()}, "mxfp4"),
    "nvfp4 with scales for all rows": ("nvfp4", {"weight_global_scale": torch.ones(12)}, "nvfp4"),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_a_layout_that_is_another_is_refused_by_name(case: str):
    golden, changed, why = DAMAGED[case]
    tensors = {**GOLDEN[f"{golden}-bfloat16"].held, **changed}
    with pytest.raises(FormatError, match=rf"^layers\.0: .*{why}"):
        packed_of(tensors, "layers.0", made.quantization_config(golden))


@pytest.mark.parametrize("bits", [[4], {}, "8", 3, [8, 4]], ids=str)
def test_bits_of_codes_in_bytes_that_are_none_are_refused(bits: object):
    config = made.quantization_config("w8a8")
    config["config_groups"]["group_0"] = {"weights": {"num_bits": bits}}
    with pytest.raises(FormatError, match=r"^a test: .*bits"):
        packed_of(GOLDEN["w8a8-bfloat16"].held, "a test", config)


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
