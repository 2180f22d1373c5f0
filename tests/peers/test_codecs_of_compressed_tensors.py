"""Weights that compressed-tensors has compressed: what is refused of them, and whether their golden file is right."""

import json
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from codec_table import made, same

from surgery.codecs import packed_of
from surgery.codecs.compressed_config import refuse_unsupported
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
