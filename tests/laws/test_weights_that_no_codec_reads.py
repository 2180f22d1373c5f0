"""Weights that no codec claims, that contradict themselves, or that are held in another layout: refused by name."""

import json
from collections.abc import Mapping

import pytest
import torch
from codec_examples import weights
from torch import Tensor

from surgery.codecs import codec_of, packed_of
from surgery.codecs.bnb4 import Bnb4
from surgery.codecs.bnb8 import Bnb8
from surgery.codecs.compressed_ints import IntQuantized, PackQuantized
from surgery.codecs.fp8_block import Fp8Block
from surgery.codecs.fp8_rows import Fp8Rows
from surgery.codecs.mxfp4 import Mxfp4
from surgery.codecs.mxfp4_packed import Mxfp4Packed
from surgery.codecs.nvfp4 import Nvfp4
from surgery.core.codec import Packed
from surgery.errors import ConfigError, FormatError, ValueRangeError


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
        with pytest.raises(ConfigError, match=r"in \d bits"):
            codec.fresh(torch.ones(2, 32), wrong)
    with pytest.raises(ConfigError, match="nvfp4"):
        Nvfp4().fresh(torch.ones(2, 24), {})
    for packed in (torch.ones(2, 48), torch.ones(2, 32).double()):
        with pytest.raises(ConfigError, match="mxfp4"):
            Mxfp4Packed().fresh(packed, {})
    for rows in (torch.ones(2, 2, 2), torch.ones(2, 2).double()):
        with pytest.raises(ConfigError, match="fp8 by rows"):
            Fp8Rows().fresh(rows, {})
