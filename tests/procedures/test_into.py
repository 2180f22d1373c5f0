"""Merges into a format: the codes and scales that the merged weights would be given, verified, and undone."""

import json
import math
from pathlib import Path

import pytest
import torch
from checkpoint_folders import INDEX, file_hashes, read_tensors, rewrite, tensor_hashes, write_adapter, write_base
from into_folders import ANY, factors, plain_base
from quantized_folders import SHAPES, SITES, plain_weights, quantized_base

import surgery
from surgery import FormatError, MatchError, UsageError
from surgery.adapters.peft import open_adapter
from surgery.codecs import FORMS
from surgery.codecs.methods import LISTED_PLAINLY
from surgery.core.adapter import Weighted
from surgery.core.arithmetic import exact_product
from surgery.core.survival import Bounds
from surgery.hosts.checkpoint import Checkpoint
from surgery.procedures.planning.treatment import HELD_IN, Treatment
from surgery.procedures.writing.filling import Pace
from surgery.procedures.writing.merge_checkpoint import Options, merge_checkpoint

WHOLE_GROUPS = {"w4a16", "w8a16", "nvfp4", "mxfp4a16"}  # which the small weights here do not have


each_form = pytest.mark.parametrize("form", [form for form in HELD_IN if form not in WHOLE_GROUPS])


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    return write_adapter(tmp_path / "adapter", factors())


@pytest.mark.parametrize("base", ["plain", "fp8-rows"])
@each_form
def test_it_is_the_merge_in_16_bits_held_so_by_fresh_scales(form: str, base: str, adapter: Path, tmp_path: Path):
    begun = plain_base(tmp_path / "base") if base == "plain" else quantized_base(tmp_path / "base", base)
    surgery.merge_checkpoint(begun, adapter, tmp_path / "16bit")
    report = surgery.merge_checkpoint(begun, adapter, tmp_path / "out", into=form, **ANY)
    wanted, (codec, settings) = read_tensors(tmp_path / "16bit"), FORMS[form]
    for site in SITES:
        packed = codec.fresh(wanted.pop(f"{site}.weight"), settings)
        wanted |= {site + codec.endings[role]: values for role, values in packed.tensors.items()}
    assert tensor_hashes(read_tensors(tmp_path / "out")) == tensor_hashes(wanted)
    assert report.receipt["options"]["into"] == form
    told = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert told[LISTED_PLAINLY[told["quant_method"]]] == ["lm_head", "model.embed_tokens"]
    assert surgery.verify_checkpoint(tmp_path / "out").ok


@pytest.mark.parametrize("shards", [1, 3])
@each_form
def test_verify_grades_it_bits_and_an_unmerge_gives_the_base_back(
    form: str, shards: int, adapter: Path, tmp_path: Path
):
    base, out = plain_base(tmp_path / "base", shards), tmp_path / "out"
    receipt = surgery.merge_checkpoint(base, adapter, out, into=form, reversible=True, **ANY).receipt
    report = surgery.verify_checkpoint(base, adapter, out)
    assert report.counts["bits"] == len(SITES)
    assert report.ok
    for site in SITES:
        codes = site + next(iter(FORMS[form][0].endings.values()))
        survival = report.tensors[f"{site}.weight"].survival
        assert survival is not None
        assert survival.to_json().items() <= receipt["changed"][codes].items()
    surgery.unmerge_checkpoint(out, tmp_path / "back")
    assert file_hashes(tmp_path / "back") == file_hashes(base)


@pytest.mark.parametrize("before", ["nf4", "int8", "w4a16"])
def test_a_quantized_base_goes_into_another_format_and_comes_back(before: str, adapter: Path, tmp_path: Path):
    base, out = quantized_base(tmp_path / "base", before, 4), tmp_path / "out"
    surgery.merge_checkpoint(base, adapter, out, into="fp4", reversible=True, **ANY)
    assert surgery.verify_checkpoint(base, adapter, out).counts["bits"] == len(SITES)
    surgery.unmerge_checkpoint(out, tmp_path / "back")
    assert file_hashes(tmp_path / "back") == file_hashes(base)


@each_form
def test_a_changed_code_or_scale_is_different(form: str, adapter: Path, tmp_path: Path):
    base, out = plain_base(tmp_path / "base"), tmp_path / "out"
    surgery.merge_checkpoint(base, adapter, out, into=form, **ANY)
    codec, _ = FORMS[form]
    written = read_tensors(out)
    held = [ending for ending in codec.endings.values() if f"{SITES[0]}{ending}" in written]
    for site, ending in zip(SITES, held[:2], strict=False):
        written[f"{site}{ending}"].view(torch.uint8).view(-1)[-1] ^= 8  # by more than a step
    rewrite(out / "model.safetensors", written)
    report = surgery.verify_checkpoint(base, adapter, out)
    different = {name for name, one in report.tensors.items() if one.grade == "different"}
    assert different == {f"{site}.weight" for site in SITES[:2]}


@each_form
def test_a_merge_that_was_rounded_otherwise_before_is_rounding_and_one_off_by_more_is_different(
    form: str, adapter: Path, tmp_path: Path
):
    """As other tools merge: the delta is rounded to 16 bits, then the sum. By a twentieth more, no scale is right."""
    base, out = plain_base(tmp_path / "base"), tmp_path / "out"
    surgery.merge_checkpoint(base, adapter, out, into=form, **ANY)
    written, given, (codec, settings) = read_tensors(out), factors(), FORMS[form]
    for by, grade in ((1.0, "rounding"), (1.05, "different")):
        for site, weight in plain_weights().items():
            A, B = (given[f"{site}.lora_{letter}.weight"] for letter in "AB")
            delta = (exact_product(B, A) * (6 / 4)).float().bfloat16()
            packed = codec.fresh((weight + delta) * by, settings)
            written |= {site + codec.endings[role]: one for role, one in packed.tensors.items()}
        rewrite(out / "model.safetensors", written)
        report = surgery.verify_checkpoint(base, adapter, out)
        grades = {report.tensors[f"{site}.weight"].grade for site in SITES}
        assert grades - {"bits"} == {grade}
        assert "retained" in report.summary()


def test_weights_that_are_no_whole_groups_stay_plain_and_config_json_says_so(adapter: Path, tmp_path: Path):
    base, out = plain_base(tmp_path / "base"), tmp_path / "out"
    surgery.merge_checkpoint(base, adapter, out, into="nvfp4", reversible=True, **ANY)
    surgery.merge_checkpoint(base, adapter, tmp_path / "16bit")
    plain, found = read_tensors(tmp_path / "16bit"), read_tensors(out)
    ignored = json.loads((out / "config.json").read_text())["quantization_config"]["ignore"]
    for site in SITES:
        fits = site.endswith("up_proj")  # of 48 inputs; the others have 70
        assert (f"{site}.weight_packed" in found) is fits
        assert (site in ignored) is not fits
        assert fits or torch.equal(found[f"{site}.weight"], plain[f"{site}.weight"])
    assert surgery.verify_checkpoint(base, adapter, out).ok
    surgery.unmerge_checkpoint(out, tmp_path / "back")
    assert file_hashes(tmp_path / "back") == file_hashes(base)
    with pytest.raises(MatchError, match=r"`into=w4a16`: .* has no linear weight that it could hold"):
        surgery.merge_checkpoint(base, adapter, tmp_path / "none", into="w4a16", **ANY)


@pytest.mark.parametrize("form", HELD_IN)
def test_weights_without_elements_stay_plain(form: str, tmp_path: Path):
    shapes = {"full": (128, 128), "no_rows": (0, 128), "no_columns": (128, 0)}
    drawn = torch.Generator().manual_seed(0)
    base = {f"{site}.weight": torch.randn(shape, generator=drawn).bfloat16() for site, shape in shapes.items()}
    factors = {f"{site}.lora_A.weight": torch.randn(4, shape[1], generator=drawn) for site, shape in shapes.items()}
    factors |= {f"{site}.lora_B.weight": torch.randn(shape[0], 4, generator=drawn) for site, shape in shapes.items()}
    begun = write_base(tmp_path / "base", base)
    adapter = write_adapter(tmp_path / "adapter", factors, target_modules=list(shapes))
    surgery.merge_checkpoint(begun, adapter, tmp_path / "out", into=form, reversible=True)
    found = read_tensors(tmp_path / "out")
    assert all(torch.equal(found[f"{site}.weight"], base[f"{site}.weight"]) for site in ("no_rows", "no_columns"))
    assert surgery.verify_checkpoint(begun, adapter, tmp_path / "out").ok
    surgery.unmerge_checkpoint(tmp_path / "out", tmp_path / "back")
    assert file_hashes(tmp_path / "back") == file_hashes(begun)


def test_what_is_always_read_as_bfloat16_is_made_of_it(adapter: Path, tmp_path: Path):
    base = plain_base(tmp_path / "base", dtype=torch.float16)
    with pytest.raises(FormatError, match="nvfp4 is always read as bfloat16; give `dtype=bfloat16`"):
        surgery.merge_checkpoint(base, adapter, tmp_path / "out", into="nvfp4", **ANY)


def test_tiles_workers_and_shards_change_no_bit_and_a_weight_is_never_cut(adapter: Path, tmp_path: Path):
    surgery.merge_checkpoint(plain_base(tmp_path / "whole"), adapter, tmp_path / "out", into="nf4", **ANY)
    treatment = Treatment(into="nf4")
    options = Options(treatment, max_shard_bytes=3000, pace=Pace(workers=3, tile_elements=1), bounds=Bounds(**ANY))
    with Checkpoint(plain_base(tmp_path / "base", 5)) as base:
        merge_checkpoint(base, [Weighted(open_adapter(adapter))], tmp_path / "rows", options)
    assert tensor_hashes(read_tensors(tmp_path / "rows")) == tensor_hashes(read_tensors(tmp_path / "out"))
    files = json.loads((tmp_path / "rows" / INDEX).read_text())["weight_map"]
    assert len({file for name, file in files.items() if name.startswith(f"{SITES[0]}.weight")}) == 1
    assert len(set(files.values())) > 3


@pytest.mark.parametrize("into", ["keep", "int8"])
def test_a_module_that_the_adapter_replaces_is_plain_beside_weights_that_keep_their_format(into: str, tmp_path: Path):
    base, out, (name, *others) = quantized_base(tmp_path / "base", "nf4"), tmp_path / "out", SITES
    new = torch.randn(SHAPES["q_proj"], generator=torch.Generator().manual_seed(3))
    laid = {k: 8 * v for k, v in factors().items() if not k.startswith(name)}
    adapter = write_adapter(tmp_path / "adapter", {**laid, f"{name}.weight": new}, modules_to_save=["layers.0.q_proj"])
    surgery.merge_checkpoint(base, adapter, out, into=into, reversible=True, **ANY)
    found = read_tensors(out)
    told = json.loads((out / "config.json").read_text())["quantization_config"]["llm_int8_skip_modules"]
    assert torch.equal(found[f"{name}.weight"], new.bfloat16())
    assert name in told
    assert not {*others} & {*told}
    assert surgery.verify_checkpoint(base, adapter, out).ok
    surgery.unmerge_checkpoint(out, tmp_path / "back")
    assert file_hashes(tmp_path / "back") == file_hashes(base)


@pytest.mark.parametrize(
    ("base", "options", "error", "why"),
    [
        ("plain", {"into": "nf4", "fallback": "int8"}, UsageError, "no loader reads int8 beside"),
        ("plain", {"fallback": "16bit"}, UsageError, "give `into`"),
        ("plain", {"into": "nf4", "min_retained": math.nan}, UsageError, "`min_retained` is 'nan'; a number"),
        ("plain", {"into": "nf4", "max_noise": "1"}, UsageError, "`max_noise` is '1'; a number"),
        ("plain", {"into": "nf4", "probes": -1}, UsageError, "probes"),
        ("plain", {"rounding": "feedback"}, UsageError, "give `into`"),
        ("plain", {"min_retained": 0.5}, UsageError, "`min_retained` is for merges into a format"),
        ("nf4", {"max_noise": 1.0, "into": "16bit"}, UsageError, "`max_noise` is for merges into a format"),
        ("nf4", {"probes": 8}, UsageError, "`probes` is for merges into a format"),
        ("plain", {"into": "nf4", "rounding": "up"}, UsageError, "nearest, feedback"),
        ("fp8-rows", {"into": "keep", "fallback": "16bit", "min_retained": 1.1}, FormatError, "fbgemm_fp8"),
        ("plain", {"into": "nf4", "fallback": "16bit", "min_retained": 1.1}, MatchError, "too little there"),
        ("plain", {"into": "w4a16-asym"}, UsageError, "loads no packed zero points"),
        ("plain", {"into": "mxfp4"}, UsageError, "kernels for GPUs"),
        ("plain", {"into": "nf4", "base_as": "nf4"}, UsageError, "base_as"),
        ("plain", {"into": "nf4", "arithmetic": "peft"}, UsageError, "exact"),
        ("plain", {"into": "nf4", "dtype": "float64"}, FormatError, "give `dtype=bfloat16`"),
        ("int8", {"into": "int8"}, UsageError, "held so already"),
    ],
    ids=str,
)
def test_what_cannot_be_is_refused(base: str, options: dict, error: type, why: str, adapter: Path, tmp_path: Path):
    begun = plain_base(tmp_path / "base") if base == "plain" else quantized_base(tmp_path / "base", base)
    with pytest.raises(error, match=why):
        surgery.merge_checkpoint(begun, adapter, tmp_path / "out", **options)


@pytest.mark.parametrize("field", [{"hidden_size": "many"}, {"hidden_size": 7, "num_attention_heads": 0}], ids=str)
def test_a_config_of_which_no_model_can_be_made_is_refused(field: dict, adapter: Path, tmp_path: Path):
    base = plain_base(tmp_path / "base")
    told = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], **field}
    (base / "config.json").write_text(json.dumps(told))
    with pytest.raises(FormatError, match=r"config\.json: transformers makes no model of it"):
        surgery.merge_checkpoint(base, adapter, tmp_path / "out", into="nf4")


def test_a_config_of_more_layers_than_tensors_builds_no_model(adapter: Path, tmp_path: Path):
    base = plain_base(tmp_path / "base")
    told = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "num_hidden_layers": 10**9}
    (base / "config.json").write_text(json.dumps(told))
    report = surgery.merge_checkpoint(base, adapter, tmp_path / "out", into="nf4", **ANY)
    assert "4 weights are held in nf4; linear ones that are not: 2" in report.receipt["notes"]


def test_a_base_without_a_linear_weight_is_refused(tmp_path: Path):
    base = write_base(tmp_path / "base", {"wte.weight": torch.ones(11, 8)}, config={"model_type": "gpt2"})
    adapter = write_adapter(
        tmp_path / "adapter",
        {"wte.lora_embedding_A": torch.ones(4, 11), "wte.lora_embedding_B": torch.ones(8, 4)},
        target_modules=["wte"],
    )
    with pytest.raises(MatchError, match="no linear weight"):
        surgery.merge_checkpoint(base, adapter, tmp_path / "out", into="nf4")
