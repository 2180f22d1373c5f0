"""Merges into quantized checkpoints: decoded as the base computes, added exactly, written plainly, and undone."""

import json
from pathlib import Path

import pytest
import torch
from checkpoint_folders import file_hashes, flip_byte, read_tensors, rewrite, tensor_hashes, write_adapter, write_base
from quantized_folders import FORMATS, SHAPES, SITES, decoded, experts_base, factors, quantized_base
from torch import Tensor

import surgery
from surgery import FormatError, InputError, UsageError
from surgery.adapters.peft import open_adapter
from surgery.codecs.mxfp4 import Mxfp4
from surgery.core.adapter import Weighted
from surgery.core.codec import Packed
from surgery.hosts.checkpoint import Checkpoint
from surgery.procedures.writing.filling import Pace
from surgery.procedures.writing.merge_checkpoint import Options, merge_checkpoint

RECEIPT = "surgery.receipt.json"


each_form = pytest.mark.parametrize("form", FORMATS)


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    return write_adapter(tmp_path / "adapter", factors())


def merged(form: str, compute: torch.dtype, outcome: torch.dtype) -> dict[str, Tensor]:
    """The weights as they have to be: decoded, added in float64, rounded once."""
    found, given = decoded(form, compute), factors()
    for name, weight in found.items():
        site, total = name.removesuffix(".weight"), weight.double()
        if f"{site}.lora_A.weight" in given:
            A, B = (given[f"{site}.lora_{letter}.weight"].double() for letter in "AB")
            total = total + 6 / 4 * (B @ A)
        found[name] = rounded_to_odd(total).to(outcome) if outcome.itemsize == 2 else total.to(outcome)
    return found


def rounded_to_odd(values: Tensor) -> Tensor:
    """In float32, from which a conversion to a half type rounds as one from the values would."""
    near = values.float()
    bits = near.view(torch.int32)
    inward = torch.where(near.double().abs() > values.abs(), bits - 1, bits)
    return torch.where(near.double() != values, inward | 1, bits).view(torch.float32)


@each_form
def test_a_merge_is_decoded_added_exactly_and_rounded_once(form: str, adapter: Path, tmp_path: Path) -> None:
    base = quantized_base(tmp_path / "base", form)
    report = surgery.merge_checkpoint(base, adapter, tmp_path / "out")
    found, wanted = read_tensors(tmp_path / "out"), merged(form, torch.bfloat16, torch.bfloat16)
    plain = {
        name: one for name, one in read_tensors(base).items() if name.startswith(("model.embed", "model.norm", "lm_"))
    }
    assert tensor_hashes(found) == tensor_hashes(wanted | plain)
    assert report.receipt["changed"].keys() == wanted.keys()
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert "quantization_config" not in config
    assert config["dtype"] == "bfloat16"
    codec = FORMATS[form][0].name
    assert f"4 weights held as {codec} are decoded to bfloat16 and written in bfloat16" in report.receipt["notes"]
    assert "config.json loses its quantization_config" in report.receipt["notes"]
    assert surgery.verify_checkpoint(tmp_path / "out").ok


@each_form
def test_verify_grades_it_bits_and_a_changed_weight_different(form: str, adapter: Path, tmp_path: Path) -> None:
    base, out = quantized_base(tmp_path / "base", form), tmp_path / "out"
    surgery.merge_checkpoint(base, adapter, out)
    assert surgery.verify_checkpoint(base, adapter, out).counts["bits"] == len(SITES)
    changed = read_tensors(out)[f"{SITES[3]}.weight"].clone()
    changed[-1, -1] += 1
    rewrite(out / "model.safetensors", {f"{SITES[3]}.weight": changed})
    report = surgery.verify_checkpoint(base, adapter, out)
    assert [name for name, one in report.tensors.items() if one.grade == "different"] == [f"{SITES[3]}.weight"]


@pytest.mark.parametrize("shards", [1, 4])
@each_form
def test_an_unmerge_brings_codes_and_scales_back(form: str, shards: int, adapter: Path, tmp_path: Path) -> None:
    base = quantized_base(tmp_path / "base", form, shards)
    surgery.merge_checkpoint(base, adapter, tmp_path / "out", reversible=True)
    surgery.unmerge_checkpoint(tmp_path / "out", tmp_path / "back")
    assert file_hashes(tmp_path / "back") == file_hashes(base)


@each_form
def test_tiles_workers_and_shards_change_no_bit(form: str, adapter: Path, tmp_path: Path) -> None:
    """One row at a time, of which some begin within a block or a byte."""
    surgery.merge_checkpoint(quantized_base(tmp_path / "whole", form), adapter, tmp_path / "out")
    options = Options(max_shard_bytes=5000, pace=Pace(workers=3, tile_elements=1))
    with Checkpoint(quantized_base(tmp_path / "base", form, 5)) as base:
        merge_checkpoint(base, [Weighted(open_adapter(adapter))], tmp_path / "rows", options)
    assert tensor_hashes(read_tensors(tmp_path / "rows")) == tensor_hashes(read_tensors(tmp_path / "out"))


COMPUTED = {
    "the config's": ("nf4", {}, {"bnb_4bit_compute_dtype": "float16"}, torch.float16, torch.float16),
    "the state's": ("nf4", {}, {"bnb_4bit_compute_dtype": None}, torch.bfloat16, torch.bfloat16),
    "float32, written as the state's": (
        "nf4",
        {},
        {"bnb_4bit_compute_dtype": "float32"},
        torch.float32,
        torch.bfloat16,
    ),
    "the caller's": ("nf4", {"compute_dtype": "float16"}, {}, torch.float16, torch.float16),
    "written wider": ("nf4", {"dtype": "float32"}, {}, torch.bfloat16, torch.float32),
    "of 8 bits": ("int8", {"compute_dtype": torch.float16}, {}, torch.float16, torch.float16),
}


@pytest.mark.parametrize("case", COMPUTED)
def test_weights_are_decoded_to_the_dtype_that_is_computed_in(case: str, adapter: Path, tmp_path: Path) -> None:
    form, options, told, compute, outcome = COMPUTED[case]
    base = quantized_base(tmp_path / "base", form, quantization_config=dict(FORMATS[form][2]) | told)
    surgery.merge_checkpoint(base, adapter, tmp_path / "out", **options)
    found, wanted = read_tensors(tmp_path / "out"), merged(form, compute, outcome)
    assert tensor_hashes({name: found[name] for name in wanted}) == tensor_hashes(wanted)
    option = {"compute_dtype": options["compute_dtype"]} if "compute_dtype" in options else {}
    grades = surgery.verify_checkpoint(base, adapter, tmp_path / "out", **option).tensors
    assert {grades[name].grade for name in wanted} == {"bits"}


def test_experts_are_decoded_as_transformers_holds_them(tmp_path: Path) -> None:
    base = experts_base(tmp_path / "base")
    given = {
        "model.layers.0.q_proj.lora_A.weight": torch.ones(4, 6),
        "model.layers.0.q_proj.lora_B.weight": torch.ones(8, 4),
    }
    adapter = write_adapter(tmp_path / "one", given)
    surgery.merge_checkpoint(base, adapter, tmp_path / "out", reversible=True)
    before, after = read_tensors(base), read_tensors(tmp_path / "out")
    name = "model.layers.0.mlp.experts.gate_up_proj"
    packed = Packed({role: before[f"{name}_{role}"] for role in ("blocks", "scales")})
    assert torch.equal(after[name], Mxfp4().decode(packed, torch.bfloat16))
    assert after.keys() == {name, f"{name}_bias", "model.layers.0.q_proj.weight"}
    assert surgery.verify_checkpoint(base, adapter, tmp_path / "out").ok
    surgery.unmerge_checkpoint(tmp_path / "out", tmp_path / "back")
    assert file_hashes(tmp_path / "back") == file_hashes(base)


@each_form
def test_inspect_lists_the_weights_and_not_what_holds_them(form: str, tmp_path: Path) -> None:
    base = quantized_base(tmp_path / "base", form)
    rows = {row.name: row for row in surgery.inspect(base).rows}
    assert {name: rows[name].shape for name in SITES} == {site: SHAPES[site.rpartition(".")[2]] for site in SITES}
    assert {rows[name].dtype for name in SITES} == {FORMATS[form][0].name}
    assert len(rows) == len(SITES) + 3
    assert sum(row.size_bytes for row in rows.values()) == sum(one.nbytes for one in read_tensors(base).values())


def test_the_receipt_and_the_plan_tell_of_every_packed_tensor(adapter: Path, tmp_path: Path) -> None:
    base = quantized_base(tmp_path / "base", "nf4-double")
    plan = surgery.plan(base, adapter).to_json()
    assert {one["held"] for one in plan["changes"]} == {"bnb4"}
    assert plan["bytes"]["read"] == sum(one.nbytes for one in read_tensors(base).values())
    receipt = surgery.merge_checkpoint(base, adapter, tmp_path / "out").receipt
    assert plan["bytes"]["written"] == sum(one.nbytes for one in read_tensors(tmp_path / "out").values())
    held = {name for one in receipt["changed"].values() for name in one["base_sha256"]}
    assert held | receipt["untouched"].keys() == read_tensors(base).keys()
    assert receipt["base"]["fingerprint"] == surgery.inspect(base, sha256=True).sha256


REFUSED = {
    "gptq": ({"quant_method": "gptq"}, "GPTQModel"),
    "awq": ({"quant_method": "awq"}, "llm-compressor"),
    "hqq": ({"quant_method": "hqq"}, "hqq"),
    "compressed": ({"quant_method": "compressed-tensors", "sparsity_config": {"format": "marlin"}}, "dequantize=True"),
    "torchao": ({"quant_method": "torchao", "quant_type": "int4_weight_only"}, "dequantize"),
    "another": ({"quant_method": "quanto"}, "dequantize"),
    "none": ({"bits": 4}, "dequantize"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_formats_that_are_not_read_are_refused_by_name(case: str, adapter: Path, tmp_path: Path) -> None:
    told, step = REFUSED[case]
    base = quantized_base(tmp_path / "base", "nf4", quantization_config=told)
    with pytest.raises(FormatError, match=f"{str(told.get('quant_method'))[:10]}.*not supported.*{step}"):
        surgery.merge_checkpoint(base, adapter, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_fp8_base_without_its_quantization_block_is_still_scaled(adapter: Path, tmp_path: Path) -> None:
    """transformers writes such ones on a CPU, and loads them without the scales: thousands of times too large."""
    base = quantized_base(tmp_path / "base", "fp8-rows")
    config = json.loads((base / "config.json").read_text())
    del config["quantization_config"]
    (base / "config.json").write_text(json.dumps(config))
    surgery.merge_checkpoint(base, adapter, tmp_path / "out")
    found, wanted = read_tensors(tmp_path / "out"), merged("fp8-rows", torch.bfloat16, torch.bfloat16)
    assert tensor_hashes({name: found[name] for name in wanted}) == tensor_hashes(wanted)


def test_codes_without_scales_are_refused(adapter: Path, tmp_path: Path) -> None:
    base = quantized_base(tmp_path / "base", "fp8")
    rewrite(base / "model.safetensors", {f"{SITES[3]}.weight_scale_inv": None})
    with pytest.raises(FormatError, match=f"{SITES[3]}.*no scales"):
        surgery.merge_checkpoint(base, adapter, tmp_path / "out")


def test_a_conv1d_that_bitsandbytes_has_turned_is_refused(tmp_path: Path) -> None:
    base = quantized_base(tmp_path / "base", "nf4", model_type="gpt2")
    path = base / "model.safetensors"
    tensors = {name.replace("q_proj", "c_attn"): one for name, one in read_tensors(base).items()}
    rewrite(path, dict.fromkeys(read_tensors(base)) | tensors)
    given = {name.replace("q_proj", "c_attn"): one for name, one in factors(SITES[:1]).items()}
    with pytest.raises(InputError, match="Conv1D transposed"):
        surgery.merge_checkpoint(base, write_adapter(tmp_path / "a", given), tmp_path / "out")


def test_a_compute_dtype_without_a_quantized_base_is_refused(adapter: Path, tmp_path: Path) -> None:
    base = quantized_base(tmp_path / "base", "nf4")
    surgery.merge_checkpoint(base, adapter, tmp_path / "plain")
    with pytest.raises(UsageError, match="compute_dtype"):
        surgery.merge_checkpoint(tmp_path / "plain", adapter, tmp_path / "out", compute_dtype="float16")
    with pytest.raises(UsageError, match="int8"):
        surgery.merge_checkpoint(base, adapter, tmp_path / "out", compute_dtype="int8")


def test_a_changed_code_in_the_record_is_found(adapter: Path, tmp_path: Path) -> None:
    base = quantized_base(tmp_path / "base", "nf4")
    surgery.merge_checkpoint(base, adapter, tmp_path / "out", reversible=True)
    flip_byte(tmp_path / "out" / "surgery.undo" / "streams-0")
    with pytest.raises(surgery.CheckError, match="changed"):
        surgery.unmerge_checkpoint(tmp_path / "out", tmp_path / "back")


def dora() -> tuple[dict[str, Tensor], dict[str, object]]:
    norms = {
        f"{site}.lora_magnitude_vector": torch.full((SHAPES[site.rpartition(".")[2]][0],), 7.0) for site in SITES[:3]
    }
    return factors() | norms, {"use_dora": True}


def ia3() -> tuple[dict[str, Tensor], dict[str, object]]:
    scales = {
        f"{site}.ia3_l": torch.linspace(0.5, 2, SHAPES[site.rpartition(".")[2]][0]).unsqueeze(1) for site in SITES[:3]
    }
    fields = {"target_modules": ["q_proj", "up_proj"], "feedforward_modules": []}
    return scales, {"config": surgery.IA3Config(**fields)}


@pytest.mark.parametrize("method", [dora, ia3])
@each_form
def test_a_merge_of_any_method_is_that_into_the_decoded_base(form: str, method, tmp_path: Path) -> None:
    base, (tensors, fields) = quantized_base(tmp_path / "base", form), method()
    config = fields.pop("config", None)
    adapter = write_adapter(tmp_path / "a", tensors, **fields)
    if config is not None:
        (adapter / "adapter_config.json").write_text(json.dumps(config.to_json()))
    write_base(tmp_path / "plain", decoded(form), config={"model_type": "llama"})
    surgery.merge_checkpoint(base, adapter, tmp_path / "out")
    surgery.merge_checkpoint(tmp_path / "plain", adapter, tmp_path / "wanted")
    found, wanted = (tensor_hashes(read_tensors(tmp_path / one)) for one in ("out", "wanted"))
    assert {name: found[name] for name in wanted} == wanted
    assert wanted != tensor_hashes(decoded(form))
    assert surgery.verify_checkpoint(base, adapter, tmp_path / "out").counts["different"] == 0
