"""What a quantization_config says: told again in other words, and kept."""

import json
from pathlib import Path

import pytest
from checkpoint_folders import write_adapter
from into_folders import ANY, factors, plain_base
from quantized_folders import SITES, quantized_base

import surgery


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    return write_adapter(tmp_path / "adapter", factors())


Q = "quantization_config."


NF4 = f"{SITES[0]}.weight"


# By the form: what is changed of the quantization_config, and what verify then says of it.
RETOLD: dict[str, tuple[str, dict[str, object], str]] = {
    "another type": ("nf4", {"bnb_4bit_quant_type": "fp4"}, f"{Q}bnb_4bit_quant_type is fp4, nf4 is wanted"),
    "8 bits of 4": ("nf4", {"load_in_4bit": False, "load_in_8bit": True}, f"{Q}load_in_4bit is False, True is wanted"),
    "another threshold": ("int8", {"llm_int8_threshold": 0.5}, f"{Q}llm_int8_threshold is 0.5, 6.0 is wanted"),
    "other blocks": ("fp8_block", {"weight_block_size": [64, 64]}, f"{Q}weight_block_size is [64, 64], [128, 128] is"),
    "no blocks": ("fp8_block", {"weight_block_size": None}, f"{Q}weight_block_size is None, [128, 128] is"),
    "another method": ("fp8_block", {"quant_method": "fbgemm_fp8"}, f"{Q}quant_method is fbgemm_fp8, fp8 is wanted"),
    "codes left plain": (
        "nf4",
        {"llm_int8_skip_modules": ["lm_head", SITES[0]]},
        f"names {NF4}, which is held in codes",
    ),
    "a list in another order": ("fp8_block", {"modules_to_not_convert": ["model.embed_tokens", "lm_head"]}, ""),
    "a list that loaders make themselves": ("nf4", {"llm_int8_skip_modules": None}, ""),
    "as transformers spells it": ("nf4", {"load_in_4bit": None, "_load_in_4bit": True, "_load_in_8bit": False}, ""),
    "what is so by default": ("nf4", {"bnb_4bit_quant_storage": None, "bnb_4bit_use_double_quant": None}, ""),
    "another dtype to compute in": ("nf4", {"bnb_4bit_compute_dtype": "float16"}, ""),
}


def retell(folder: Path, **changed: object) -> None:
    """Other fields in its quantization_config; those that are None are left out."""
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] |= changed
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(("form", "changed", "told"), RETOLD.values(), ids=RETOLD.keys())
def test_a_quantization_config_of_another_meaning_is_different_by_its_field(
    form: str, changed: dict[str, object], told: str, adapter: Path, tmp_path: Path
):
    base, out = plain_base(tmp_path / "base"), tmp_path / "out"
    surgery.merge_checkpoint(base, adapter, out, into=form, **ANY)
    retell(out, **changed)
    report = surgery.verify_checkpoint(base, adapter, out)
    assert told in report.tensors["config.json"].why if told else report.ok


KEPT: dict[str, tuple[str, dict[str, object], str]] = {
    "another dtype to compute in": (
        "nf4",
        {"bnb_4bit_compute_dtype": "float16"},
        f"{Q}bnb_4bit_compute_dtype is float16",
    ),
    "other groups": ("w4a16", {"symmetric": False}, f"{Q}config_groups is "),
    "groups by another name": ("w4a16", {}, ""),
}


@pytest.mark.parametrize(("form", "changed", "told"), KEPT.values(), ids=KEPT.keys())
def test_a_base_that_keeps_its_format_keeps_what_its_config_says(
    form: str, changed: dict[str, object], told: str, adapter: Path, tmp_path: Path
):
    base, out = quantized_base(tmp_path / "base", form), tmp_path / "out"
    surgery.merge_checkpoint(base, adapter, out, into="keep", **ANY)
    if form == "w4a16":
        groups = json.loads((out / "config.json").read_text())["quantization_config"]["config_groups"]
        (group,) = groups.values()
        changed = {"config_groups": {"mine": {**group, "weights": {**group["weights"], "dynamic": False, **changed}}}}
    retell(out, version="0.99", **changed)
    report = surgery.verify_checkpoint(base, adapter, out)
    assert told in report.tensors["config.json"].why if told else report.ok
