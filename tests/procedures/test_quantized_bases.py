"""Merges into quantized checkpoints: decoded as the base computes, added exactly, written plainly, and undone."""

import json
from pathlib import Path

import pytest
import torch
from checkpoint_folders import file_hashes, flip_byte, read_tensors, rewrite, tensor_hashes, write_adapter, write_base
from quantized_folders import FORMATS, SHAPES, SITES, decoded, experts_base, plain_weights, quantized_base
from torch import Tensor

import surgery
from surgery import FormatError, InputError, UsageError
from surgery.adapters.peft import open_adapter
from surgery.codecs import FORMS, packed_of
from surgery.codecs.bnb4 import Bnb4
from surgery.codecs.mxfp4 import Mxfp4
from surgery.core.adapter import Weighted
from surgery.core.codec import Packed
from surgery.hosts.checkpoint import Checkpoint
from surgery.procedures.planning.treatment import Treatment
from surgery.procedures.writing.filling import Pace
from surgery.procedures.writing.merge_checkpoint import Options, merge_checkpoint

RECEIPT = "surgery.receipt.json"
each_form = pytest.mark.parametrize("form", FORMATS)


def factors(sites: tuple[str, ...] = SITES[:3]) -> dict[str, Tensor]:
    """On the 22-bit grid as they are."""
    drawn, found = torch.Generator().manual_seed(1), {}
    for site in sites:
        out, in_features = SHAPES[site.rpartition(".")[2]]
        found[f"{site}.lora_A.weight"] = torch.randn(4, in_features, generator=drawn).half().float()
        found[f"{site}.lora_B.weight"] = torch.randn(out, 4, generator=drawn).half().float() / 64
    return found


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


def strong(share: float) -> dict[str, Tensor]:
    """Factors whose delta is about this share of each weight."""
    return {name: one * 12 * share if "lora_B" in name else one for name, one in factors().items()}


def survived(form: str, before: Packed, after: Packed, delta: Tensor) -> tuple[float, float]:
    """By the definition, of one weight."""
    codec = FORMATS[form][0]
    moved = codec.decode(after, torch.float64) - codec.decode(before, torch.float64)
    retained = float((moved * delta).sum() / (delta * delta).sum())
    return retained, float((moved - retained * delta).norm() / delta.norm())


@each_form
def test_a_weight_that_keeps_its_format_has_the_nearest_codes_by_its_own_scales(form: str, tmp_path: Path) -> None:
    base, out, given = quantized_base(tmp_path / "base", form), tmp_path / "out", strong(1.0)
    adapter = write_adapter(tmp_path / "a", given)
    report = surgery.merge_checkpoint(base, adapter, out, into="keep", reversible=True)
    before, after, codec = read_tensors(base), read_tensors(out), FORMATS[form][0]
    codes = next(iter(codec.endings))
    changed = {name for name in before if not same_bytes(before[name], after[name])}
    assert changed == {f"{one}{codec.endings[codes]}" for one in SITES[:3]}
    assert (out / "config.json").read_bytes() == (base / "config.json").read_bytes()
    for site in SITES[:3]:
        held = [
            {r: one[site + end] for r, end in codec.endings.items() if site + end in one} for one in (before, after)
        ]
        packed, found = (packed_of(one, site, FORMATS[form][2]) for one in held)
        A, B = (given[f"{site}.lora_{letter}.weight"].double() for letter in "AB")
        wanted = codec.decode(packed, torch.float64) + 6 / 4 * (B @ A)
        assert same_bytes(found.tensors[codes], codec.encode(wanted, like=packed).tensors[codes])
        told = report.receipt["changed"][site + codec.endings[codes]]
        retained, noise = survived(form, packed, found, 6 / 4 * (B @ A))
        assert told["retained"] == pytest.approx(retained, rel=1e-5)
        assert told["noise"] == pytest.approx(noise, rel=1e-5)
    assert report.receipt["survived"]["retained"] > 0.5
    surgery.unmerge_checkpoint(out, tmp_path / "back")
    assert file_hashes(tmp_path / "back") == file_hashes(base)


@each_form
def test_verify_tells_from_the_files_alone_what_survived(form: str, tmp_path: Path) -> None:
    base, out = quantized_base(tmp_path / "base", form), tmp_path / "out"
    adapter = write_adapter(tmp_path / "a", strong(1.0))
    receipt = surgery.merge_checkpoint(base, adapter, out, into="keep").receipt
    report = surgery.verify_checkpoint(base, adapter, out)
    assert report.counts["bits"] == 3
    assert report.counts["different"] == 0
    for name, told in receipt["changed"].items():
        assert report.tensors[name].survival.to_json() == {key: told[key] for key in ("retained", "noise")}
    assert "retained" in report.summary()
    aside = (next(iter(FORMATS[form][0].endings.values())), ".weight_shape")
    beside = next(one for one in read_tensors(base) if one.startswith(f"{SITES[3]}.") and not one.endswith(aside))
    flipped = read_tensors(out)[beside].clone()
    flipped.flatten().view(torch.uint8)[0] ^= 1
    rewrite(out / "model.safetensors", {beside: flipped})
    if "weight_format" not in beside and "quant_state" not in beside:
        report = surgery.verify_checkpoint(base, adapter, out)
        assert [name for name, one in report.tensors.items() if one.grade == "different"] == [beside]


@pytest.mark.parametrize("form", ["nf4", "nf4-double", "fp4", "fp8"])
def test_an_erased_adapter_fails_with_the_option_that_would_keep_it(form: str, tmp_path: Path) -> None:
    base = quantized_base(tmp_path / "base", form)
    adapter = write_adapter(tmp_path / "a", strong(0.004))
    with pytest.raises(surgery.CheckError, match=r"retained .*--into 16bit keeps all"):
        surgery.merge_checkpoint(base, adapter, tmp_path / "out", into="keep")
    assert [path.name for path in tmp_path.iterdir() if "out" in path.name] == []
    report = surgery.merge_checkpoint(base, adapter, tmp_path / "out", into="keep", min_retained=0.0, max_noise=9.0)
    assert report.receipt["survived"]["retained"] < 0.5
    assert "retained" in report.summary()


def test_rows_in_tiles_of_any_size_keep_the_same_codes(tmp_path: Path) -> None:
    """Rows of 7 codes: two share a byte, and eight a float32 of storage."""
    drawn = torch.Generator().manual_seed(0)
    weight = torch.randn(24, 7, generator=drawn)
    packed = Bnb4().fresh(weight, {"quant_type": "nf4"})
    codes = packed.tensors["weight"].flatten().view(torch.float32).unsqueeze(1)
    tensors = {f"x.{role}": one for role, one in {**packed.tensors, "weight": codes}.items()}
    write_base(tmp_path / "base", tensors)
    given = {
        f"x.lora_{role}.weight": torch.randn(shape, generator=drawn) for role, shape in (("A", (4, 7)), ("B", (24, 4)))
    }
    adapter = write_adapter(tmp_path / "a", given, target_modules=["x"])
    surgery.merge_checkpoint(tmp_path / "base", adapter, tmp_path / "out", into="keep")
    options = Options(Treatment(into="keep"), pace=Pace(tile_elements=1))
    with Checkpoint(tmp_path / "base") as base:
        merge_checkpoint(base, [Weighted(open_adapter(adapter))], tmp_path / "rows", options)
    assert tensor_hashes(read_tensors(tmp_path / "rows")) == tensor_hashes(read_tensors(tmp_path / "out"))
    assert surgery.verify_checkpoint(tmp_path / "base", adapter, tmp_path / "out").counts["bits"] == 1


@pytest.mark.parametrize("options", [{"into": "nf5"}, {"into": "keep", "dtype": "float32"}], ids=str)
def test_what_cannot_be_meant_with_into_is_refused(options: dict[str, str], adapter: Path, tmp_path: Path) -> None:
    base = quantized_base(tmp_path / "base", "nf4")
    with pytest.raises(UsageError, match="into"):
        surgery.merge_checkpoint(base, adapter, tmp_path / "out", **options)


@pytest.mark.parametrize("into", ["16bit", "keep"])
def test_into_without_a_quantized_base_is_refused(into: str, adapter: Path, tmp_path: Path) -> None:
    surgery.merge_checkpoint(quantized_base(tmp_path / "base", "nf4"), adapter, tmp_path / "plain")
    with pytest.raises(UsageError, match="no weight of it is quantized; leave `into` out"):
        surgery.merge_checkpoint(tmp_path / "plain", adapter, tmp_path / "out", into=into)


@pytest.mark.parametrize("left", ["left behind", "lost"])
def test_verify_finds_a_quantization_config_that_contradicts_the_weights(left: str, tmp_path: Path) -> None:
    base = quantized_base(tmp_path / "base", "nf4" if left == "lost" else "fp8")
    adapter = write_adapter(tmp_path / "a", strong(1.0))
    surgery.merge_checkpoint(base, adapter, tmp_path / "out", into="keep" if left == "lost" else None)
    config = json.loads((base / "config.json").read_text())
    if left == "lost":
        del config["quantization_config"]
    (tmp_path / "out" / "config.json").write_text(json.dumps(config))
    found = surgery.verify_checkpoint(base, adapter, tmp_path / "out").tensors["config.json"]
    assert found.grade == "different"
    assert "quantization_config" in found.why


def same_bytes(left: Tensor, right: Tensor) -> bool:
    return tensor_hashes({"": left}) == tensor_hashes({"": right})


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


LORA = {"A": (4, 128), "B": (160, 4)}
AS = {"nf4": "nf4", "nf4-double": "nf4-double", "int8": "int8"}


@pytest.mark.parametrize("form", AS)
def test_a_plain_base_is_merged_as_the_form_that_the_adapter_was_trained_over(form: str, tmp_path: Path) -> None:
    """As if it were merged into the quantized base itself, at the sites of the adapter."""
    plain = {f"{site}.weight": one for site, one in plain_weights().items()}
    write_base(tmp_path / "plain", plain, config={"model_type": "llama", "dtype": "bfloat16"})
    adapter, out = write_adapter(tmp_path / "a", factors()), tmp_path / "out"
    report = surgery.merge_checkpoint(tmp_path / "plain", adapter, out, base_as=AS[form], reversible=True)
    surgery.merge_checkpoint(quantized_base(tmp_path / "base", form), adapter, tmp_path / "wanted")
    found, wanted = read_tensors(out), read_tensors(tmp_path / "wanted")
    for site in SITES[:3]:
        assert same_bytes(found[f"{site}.weight"], wanted[f"{site}.weight"])
    assert same_bytes(found[f"{SITES[3]}.weight"], plain[f"{SITES[3]}.weight"])
    assert any(f"3 weights are merged as they read from {form}; 1 other" in note for note in report.receipt["notes"])
    assert report.receipt["options"]["base_as"] == form
    assert surgery.verify_checkpoint(tmp_path / "plain", adapter, out, base_as=form).counts["bits"] == 3
    assert not surgery.verify_checkpoint(tmp_path / "plain", adapter, out).ok
    surgery.unmerge_checkpoint(out, tmp_path / "back")
    assert file_hashes(tmp_path / "back") == file_hashes(tmp_path / "plain")


@pytest.mark.parametrize("form", FORMS)
def test_base_as_any_form_is_a_merge_into_what_that_form_decodes_to(form: str, tmp_path: Path) -> None:
    (codec, settings), drawn = FORMS[form], torch.Generator().manual_seed(0)
    weight = torch.randn(160, 128, generator=drawn).bfloat16()  # whole groups of inputs, and no whole blocks of outputs
    held = codec.decode(codec.fresh(weight, settings), torch.bfloat16)
    for name, one in (("plain", weight), ("held", held)):
        write_base(tmp_path / name, {f"{SITES[0]}.weight": one}, config={"model_type": "llama", "dtype": "bfloat16"})
    given = {f"{SITES[0]}.lora_{one}.weight": torch.randn(shape, generator=drawn) for one, shape in LORA.items()}
    adapter, out = write_adapter(tmp_path / "a", given), tmp_path / "out"
    surgery.merge_checkpoint(tmp_path / "plain", adapter, out, base_as=form, reversible=True)
    surgery.merge_checkpoint(tmp_path / "held", adapter, tmp_path / "wanted")
    assert tensor_hashes(read_tensors(out)) == tensor_hashes(read_tensors(tmp_path / "wanted"))
    assert surgery.verify_checkpoint(tmp_path / "plain", adapter, out, base_as=form).counts["bits"] == 1
    surgery.unmerge_checkpoint(out, tmp_path / "back")
    assert file_hashes(tmp_path / "back") == file_hashes(tmp_path / "plain")


def test_a_base_that_is_quantized_itself_is_not_taken_as_another(adapter: Path, tmp_path: Path) -> None:
    base = quantized_base(tmp_path / "base", "nf4")
    with pytest.raises(UsageError, match="quantized itself"):
        surgery.merge_checkpoint(base, adapter, tmp_path / "out", base_as="nf4")
    with pytest.raises(UsageError, match="`base_as` is 'nf5'"):
        surgery.plan(base, adapter, base_as="nf5")


def test_a_weight_beyond_the_form_is_refused_by_name(adapter: Path, tmp_path: Path) -> None:
    plain = {f"{site}.weight": one * 1e6 for site, one in plain_weights().items()}
    write_base(tmp_path / "plain", plain)
    with pytest.raises(surgery.ValueRangeError, match=rf"^{SITES[0]}\.weight: 8-bit"):
        surgery.merge_checkpoint(tmp_path / "plain", adapter, tmp_path / "out", base_as="int8")
