"""What tools of the field are known to leave of quantized merges: different, or refused by name, and not ours."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from test_quantized_bases_of_transformers import FILE, SMALL, in_fp8, loaded, near, outputs, pre_quantized, trained
from torch import Tensor, nn
from transformers import BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM

import surgery
from surgery.codecs import codec_of
from surgery.codecs.bnb4 import Bnb4
from surgery.codecs.bnb8 import Bnb8
from surgery.core.codec import Packed
from surgery.hosts.checkpoint import Checkpoint

HALF, SITE = torch.bfloat16, "model.layers.1.mlp.up_proj"
ANY: dict[str, Any] = {"min_retained": 0.0, "max_noise": 99.0}
FOURBIT = {"load_in_4bit": True, "bnb_4bit_compute_dtype": HALF}
KINDS: Mapping[str, dict[str, Any]] = {
    "nf4": FOURBIT | {"bnb_4bit_quant_type": "nf4"},
    "nf4-double": FOURBIT | {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
    "fp4": FOURBIT | {"bnb_4bit_quant_type": "fp4"},
    "int8": {"load_in_8bit": True},
}
pytestmark = pytest.mark.filterwarnings("ignore:Merge lora module to")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A plain base, its nf4, int8 and fp8 forms, an adapter trained over the first, and peft's merge of the two."""
    folder = tmp_path_factory.mktemp("defects")
    for kind in ("nf4", "int8"):
        pre_quantized(folder / kind, HALF, **KINDS[kind])
    plain = shutil.copytree(folder / "nf4" / "plain", folder / "plain")
    trained(loaded(plain, HALF)).save_pretrained(folder / "adapter")
    merge_by_peft(plain, folder / "adapter").save_pretrained(folder / "merged")
    return folder


@pytest.fixture(scope="module")
def fp8(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A base of whole blocks in fp8, and an adapter."""
    base, adapter = (tmp_path_factory.mktemp("fp8") / one for one in ("base", "adapter"))
    torch.manual_seed(0)
    sizes = SMALL | {"hidden_size": 128, "intermediate_size": 256}
    LlamaForCausalLM(LlamaConfig(**sizes)).to(HALF).save_pretrained(base)
    trained(loaded(base, HALF)).save_pretrained(adapter)
    in_fp8(base, (128, 128))
    return base, adapter


def merge_by_peft(base: Path, adapter: Path, **options: Any) -> Any:
    return peft.PeftModel.from_pretrained(loaded(base, HALF, **options), adapter).merge_and_unload()


def different(*paths: Path) -> dict[str, str]:
    """What is, and why."""
    report = surgery.verify_checkpoint(*paths)
    return {name: one.why for name, one in report.tensors.items() if one.grade == "different"}


def held(folder: Path) -> Tensor:
    """A weight as its codes read, in float64."""
    with Checkpoint(folder) as found:
        packed = found.load(next(one for one in found.sites() if one.name == SITE))
    return codec_of(packed, SITE).decode(packed, torch.float64)


def delta(adapter: Path) -> Tensor:
    """What the adapter adds to it, in float64."""
    tensors, config = load_file(adapter / "adapter_model.safetensors"), surgery.LoraConfig.from_pretrained(adapter)
    A, B = (tensors[f"base_model.model.{SITE}.lora_{role}.weight"].double() for role in "AB")
    return B @ A * (config.lora_alpha / config.r)


def copied(folder: Path, to: Path, **tensors: Tensor) -> Path:
    """A model with other tensors."""
    shutil.copytree(folder, to)
    save_file({**load_file(folder / FILE), **tensors}, to / FILE, {"format": "pt"})
    return to


@pytest.mark.parametrize("kind", KINDS)
def test_a_merge_by_peft_that_bitsandbytes_then_quantizes_is_graded_right_and_one_of_another_model_different(
    kind: str, made: Path, tmp_path: Path
):
    """The field's way to a quantized merge; what it leaves of the adapter is told from the files alone."""
    for name in ("merged", "plain"):
        model = loaded(made / name, HALF, quantization_config=BitsAndBytesConfig(**KINDS[kind]))
        model.save_pretrained(tmp_path / name)
    report = surgery.verify_checkpoint(made / "plain", made / "adapter", tmp_path / "merged")
    assert report.ok, report.summary()
    told = report.tensors[f"{SITE}.weight"].survival
    assert told is not None
    begin, after = held(tmp_path / "plain"), held(tmp_path / "merged")
    d = delta(made / "adapter")
    # A product of four terms, whose factors the exact merge puts on a grid of 2^-22 of their largest.
    room = 4 * 2.0**-21
    assert told.retained == pytest.approx(float(((after - begin) * d).sum() / (d * d).sum()), rel=room)
    assert f"{SITE}.weight" in different(made / "plain", made / "adapter", tmp_path / "plain")


def test_a_merge_by_peft_that_is_quantized_to_fp8_is_graded_right(made: Path, tmp_path: Path):
    in_fp8(shutil.copytree(made / "merged", tmp_path / "out"), (128, 128))
    report = surgery.verify_checkpoint(made / "plain", made / "adapter", tmp_path / "out")
    assert report.ok, report.summary()
    in_fp8(shutil.copytree(made / "plain", tmp_path / "other"), (128, 128))
    assert f"{SITE}.weight" in different(made / "plain", made / "adapter", tmp_path / "other")


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_merged_saves_of_models_that_were_quantized_before_crash_and_ours_are_loaded(
    kind: str, made: Path, tmp_path: Path
):
    base, adapter = made / kind / "base", made / "adapter"
    with pytest.raises(NotImplementedError):
        merge_by_peft(base, adapter).save_pretrained(tmp_path / "peft")
    model = surgery.load(loaded(base, HALF), adapter)
    model.save_merged(tmp_path / "live")
    surgery.merge_checkpoint(base, adapter, tmp_path / "files")
    live, files = (load_file(tmp_path / one / FILE) for one in ("live", "files"))
    assert live.keys() == files.keys()
    assert all(torch.equal(live[name], one) for name, one in files.items())
    assert {type(one) for name, one in loaded(tmp_path / "live", HALF).named_modules() if name.endswith("_proj")} == {
        nn.Linear
    }


def test_an_fp8_model_that_is_saved_without_its_quantization_block_is_found_and_ours_is_plain(
    fp8: tuple[Path, Path], tmp_path: Path
):
    """transformers decodes it on a CPU, and writes fp8 again with no word of it: thousands of times too large."""
    (base, adapter), broken = fp8, tmp_path / "broken"
    merge_by_peft(base, adapter).save_pretrained(broken)
    assert load_file(broken / FILE)[f"{SITE}.weight"].dtype == torch.float8_e4m3fn
    assert "quantization_config" not in json.loads((broken / "config.json").read_text())
    assert "lacks a quantization_config" in different(base, adapter, broken)["config.json"]
    model = surgery.load(loaded(base, HALF), adapter)  # as transformers loads it on a CPU
    wanted = outputs(model)
    model.save_merged(tmp_path / "live")
    surgery.merge_checkpoint(base, adapter, tmp_path / "files")
    live, files = (load_file(tmp_path / one / FILE) for one in ("live", "files"))
    assert all(torch.equal(live[name], one) for name, one in files.items())
    assert near(outputs(loaded(tmp_path / "live", HALF)), wanted, HALF)
    assert near(outputs(surgery.load_model(adapter)), wanted, HALF)
    surgery.merge_checkpoint(broken, adapter, tmp_path / "scaled")  # as a base it is read by its scales all the same
    scaled = load_file(tmp_path / "scaled" / FILE)[f"{SITE}.weight"]
    assert float(scaled.abs().max()) < 4 * float(live[f"{SITE}.weight"].abs().max())


def test_a_merge_by_fresh_scales_is_different_and_says_so_and_a_dequantized_one_passes(made: Path, tmp_path: Path):
    base, adapter = made / "nf4" / "base", made / "adapter"
    anew = merge_by_peft(base, adapter)
    anew.save_pretrained(tmp_path / "anew", save_original_format=False)
    found = different(base, adapter, tmp_path / "anew")
    assert "quantized anew, by scales of its own" in found[f"{SITE}.weight.absmax"]
    plain = loaded(base, HALF).dequantize()
    peft.PeftModel.from_pretrained(plain, adapter).merge_and_unload().save_pretrained(
        tmp_path / "plain", save_original_format=False
    )
    assert surgery.verify_checkpoint(base, adapter, tmp_path / "plain").ok
    surgery.merge_checkpoint(base, adapter, tmp_path / "kept", into="keep", **ANY)
    ours, before = (load_file(one / FILE) for one in (tmp_path / "kept", base))
    assert torch.equal(ours[f"{SITE}.weight.absmax"], before[f"{SITE}.weight.absmax"])


def test_a_decoding_of_8_bits_by_127_is_not_that_of_bitsandbytes_nor_ours(made: Path, tmp_path: Path):
    import bitsandbytes.functional as bnb

    base, adapter, out = made / "int8" / "base", made / "adapter", tmp_path / "out"
    held = load_file(base / FILE)
    codes, SCB = held[f"{SITE}.weight"], held[f"{SITE}.SCB"]
    wide = {"compute_dtype": "float32", "dtype": "float32"}
    zero = shutil.copytree(adapter, tmp_path / "zero")
    none = {name: one * 0 for name, one in load_file(zero / "adapter_model.safetensors").items()}
    save_file(none, zero / "adapter_model.safetensors")
    surgery.merge_checkpoint(base, zero, out, **wide)
    by_127 = codes.float() * SCB.unsqueeze(1) / 127
    found = load_file(out / FILE)[f"{SITE}.weight"]
    assert torch.equal(found, bnb.int8_vectorwise_dequant(codes, SCB))
    assert torch.equal(found, Bnb8().decode(Packed({"weight": codes, "SCB": SCB}), torch.float32))
    assert not torch.equal(found, by_127)
    other = copied(out, tmp_path / "other", **{f"{SITE}.weight": by_127})
    grades = {
        one: surgery.verify_checkpoint(base, zero, one, compute_dtype="float32").tensors[f"{SITE}.weight"].grade
        for one in (out, other)
    }
    assert grades[out] == "bits"
    assert grades[other] != "bits"


def test_the_halves_of_bytes_in_the_other_order_are_different(made: Path, tmp_path: Path):
    base, adapter, out = made / "nf4" / "base", made / "adapter", tmp_path / "out"
    surgery.merge_checkpoint(base, adapter, out, into="keep", **ANY)
    held = load_file(out / FILE)
    codes = held[f"{SITE}.weight"]
    swapped = copied(out, tmp_path / "swapped", **{f"{SITE}.weight": codes >> 4 | codes << 4})
    assert "codes are not the nearest" in different(base, adapter, swapped)[f"{SITE}.weight"]
    packed = Packed({"weight": torch.tensor([[0x0F]], dtype=torch.uint8)})
    state = {"quant_type": "nf4", "blocksize": 64, "dtype": "float32", "shape": [1, 2]}
    scales = Bnb4().fresh(torch.ones(1, 2), {"quant_type": "nf4"}).tensors
    first, second = Bnb4().decode(Packed({**scales, **packed.tensors}, state), torch.float32)[0].tolist()
    assert (first, second) == (-1.0, 1.0)  # the first is the high half


def test_a_plain_weight_beside_a_stale_quant_state_is_refused_and_ours_leaves_none(made: Path, tmp_path: Path):
    base, adapter = made / "nf4" / "base", made / "adapter"
    plain = load_file(made / "plain" / FILE)[f"{SITE}.weight"]
    stale = copied(base, tmp_path / "stale", **{f"{SITE}.weight": plain})
    with pytest.raises(surgery.FormatError, match=rf"{SITE}.*quant state"):
        surgery.merge_checkpoint(stale, adapter, tmp_path / "out")
    with pytest.raises(surgery.FormatError, match=rf"{SITE}.*quant state"):
        surgery.verify_checkpoint(base, adapter, stale)
    surgery.merge_checkpoint(base, adapter, tmp_path / "ours")
    assert load_file(tmp_path / "ours" / FILE).keys() == load_file(made / "plain" / FILE).keys()


def test_a_quantization_config_that_is_left_behind_is_different_and_a_base_with_one_loses_it(
    made: Path, tmp_path: Path
):
    base, adapter, out = made / "nf4" / "base", made / "adapter", tmp_path / "out"
    surgery.merge_checkpoint(base, adapter, out)
    assert "quantization_config" not in json.loads((out / "config.json").read_text())
    shutil.copy(base / "config.json", out / "config.json")
    assert "has a quantization_config" in different(base, adapter, out)["config.json"]
    surgery.merge_checkpoint(out, adapter, tmp_path / "again")
    assert "quantization_config" not in json.loads((tmp_path / "again" / "config.json").read_text())


def test_fp8_codes_whose_scales_are_taken_for_their_inverse_are_different(fp8: tuple[Path, Path], tmp_path: Path):
    (base, adapter), out = fp8, tmp_path / "out"
    surgery.merge_checkpoint(base, adapter, out)
    held = load_file(base / FILE)
    name = f"{SITE}.weight"
    scales = held[f"{name}_scale_inv"].repeat_interleave(128, 0).repeat_interleave(128, 1)
    wrong = held[name].float() / scales
    assert name in different(base, adapter, copied(out, tmp_path / "wrong", **{name: wrong.bfloat16()}))
