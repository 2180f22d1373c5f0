"""Merges into a format: the codes and scales that the merged weights would be given, verified, and undone."""

import json
import math
from functools import partial
from pathlib import Path

import pytest
import torch
from checkpoint_folders import INDEX, file_hashes, read_tensors, rewrite, tensor_hashes, write_adapter, write_base
from quantized_folders import SHAPES, SITES, plain_weights, quantized_base
from torch import Tensor

import surgery
from surgery import CheckError, FormatError, MatchError, UsageError
from surgery.adapters.peft import open_adapter
from surgery.codecs import FORMS
from surgery.codecs.methods import LISTED_PLAINLY
from surgery.core.adapter import Weighted
from surgery.core.arithmetic import exact_product
from surgery.core.survival import Bounds, Survival
from surgery.hosts.checkpoint import Checkpoint
from surgery.procedures.planning.treatment import HELD_IN, Treatment
from surgery.procedures.writing.filling import Pace
from surgery.procedures.writing.merge_checkpoint import Options, merge_checkpoint

ANY = {"min_retained": 0.0, "max_noise": math.inf}
WHOLE_GROUPS = {"w4a16", "w8a16", "nvfp4", "mxfp4a16"}  # which the small weights here do not have
each_form = pytest.mark.parametrize("form", [form for form in HELD_IN if form not in WHOLE_GROUPS])


def plain_base(folder: Path, shards: int = 1, dtype: torch.dtype = torch.bfloat16) -> Path:
    weights = {f"{site}.weight": weight for site, weight in plain_weights(dtype).items()}
    tensors = {"model.embed_tokens.weight": torch.arange(770.0).view(11, 70).to(dtype), **weights}
    tensors |= {"model.norm.weight": torch.ones(48).to(dtype), "lm_head.weight": torch.ones(11, 70).to(dtype)}
    return write_base(folder, tensors, shards, {"model_type": "llama", "dtype": "bfloat16"})


def factors() -> dict[str, Tensor]:
    drawn, found = torch.Generator().manual_seed(1), {}
    for site in SITES:
        out, in_features = SHAPES[site.rpartition(".")[2]]
        found[f"{site}.lora_A.weight"] = torch.randn(4, in_features, generator=drawn)
        found[f"{site}.lora_B.weight"] = torch.randn(out, 4, generator=drawn) / 64
    return found


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
    with pytest.raises(MatchError, match=r"into w4a16: .* has no linear weight that it could hold"):
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
    with pytest.raises(FormatError, match="nvfp4 is always read as bfloat16; give --dtype bfloat16"):
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


def test_what_is_retained_is_measured_against_the_base_held_in_that_format(adapter: Path, tmp_path: Path):
    receipt = surgery.merge_checkpoint(
        plain_base(tmp_path / "base"), adapter, tmp_path / "out", into="nf4", **ANY
    ).receipt
    (codec, settings), given, total = FORMS["nf4"], factors(), Survival()
    for site, weight in plain_weights().items():
        B, A = (given[f"{site}.lora_{letter}.weight"] for letter in "BA")
        delta = exact_product(B, A) * (6 / 4)
        became = (weight.double() + delta).float().bfloat16()
        before, after = (codec.decode(codec.fresh(one, settings), torch.float64) for one in (weight, became))
        total = total.plus(Survival.of(before, before + delta, after))
    wanted, found = total.to_json(), receipt["survived"]
    assert found["retained"] == pytest.approx(wanted["retained"], rel=1e-3)  # one rounding more, of few elements
    assert found["noise"] == pytest.approx(wanted["noise"], rel=1e-3)


def test_an_adapter_that_is_drowned_there_fails_with_the_option_that_would_keep_it(tmp_path: Path):
    small = {name: one / (64 if "lora_B" in name else 1) for name, one in factors().items()}
    adapter = write_adapter(tmp_path / "small", small)
    with pytest.raises(CheckError, match=r"into nf4: .*--into 16bit keeps all"):
        surgery.merge_checkpoint(plain_base(tmp_path / "base"), adapter, tmp_path / "out", into="nf4")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("base", "into", "part", "falls"),
    [
        ("plain", "nf4", 0.5, True),
        ("plain", "nf4", 1.5, False),  # of all weights too little is left
        ("nf4", "keep", 1.5, True),
        ("w8a8", "keep", 0.5, True),
        ("fp8-rows", "keep", 0.5, False),  # its config.json lists no weights that are left plain
    ],
)
def test_a_fallback_is_named_where_it_is_of_use_and_then_keeps_the_adapter(
    base: str, into: str, part: float, falls: bool, tmp_path: Path
):
    begun = plain_base(tmp_path / "base") if base == "plain" else quantized_base(tmp_path / "base", base)
    adapter = uneven(tmp_path / "adapter")
    told = surgery.merge_checkpoint(begun, adapter, tmp_path / "any", into=into, **ANY).receipt
    most = max(one["retained"] for one in told["changed"].values() if "retained" in one)
    least = told["survived"]["retained"]
    bounds = {"min_retained": least + part * (most - least), "max_noise": math.inf}
    with pytest.raises(CheckError, match="--into 16bit keeps all of it") as raised:
        surgery.merge_checkpoint(begun, adapter, tmp_path / "out", into=into, **bounds)
    assert ("--fallback 16bit" in str(raised.value)) is falls
    if falls:
        surgery.merge_checkpoint(begun, adapter, tmp_path / "out", into=into, fallback="16bit", **bounds)
    else:
        with pytest.raises((FormatError, MatchError)):
            surgery.merge_checkpoint(begun, adapter, tmp_path / "out", into=into, fallback="16bit", **bounds)


@pytest.mark.parametrize("into", ["keep", "nf4", "fp8_block"])
def test_feedback_retains_more_is_verified_and_undone(into: str, adapter: Path, tmp_path: Path):
    base = plain_base(tmp_path / "base") if into != "keep" else quantized_base(tmp_path / "base", "nf4")
    near = surgery.merge_checkpoint(base, adapter, tmp_path / "near", into=into, **ANY).receipt
    out = tmp_path / "out"
    report = surgery.merge_checkpoint(base, adapter, out, into=into, rounding="feedback", reversible=True, **ANY)
    assert "4 of 4 adapted weights are rounded with feedback" in report.receipt["notes"]
    for site in SITES:  # along its directions nothing is lost but by chance
        before, after = (one["changed"][f"{site}.weight"]["retained"] for one in (near, report.receipt))
        assert abs(1 - after) < max(0.3, abs(1 - before))
    if into == "keep":
        assert report.receipt["survived"]["retained"] > near["survived"]["retained"] + 0.3
    assert surgery.verify_checkpoint(base, adapter, out).counts["bits"] == len(SITES)
    surgery.unmerge_checkpoint(out, tmp_path / "back")
    assert file_hashes(tmp_path / "back") == file_hashes(base)


@pytest.mark.parametrize("into", ["keep", "nf4"])
def test_rows_are_fed_back_alike_in_tiles_of_any_size(
    into: str, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    base = plain_base(tmp_path / "base") if into != "keep" else quantized_base(tmp_path / "base", "nf4")
    options = {"into": into, "rounding": "feedback", **ANY}
    surgery.merge_checkpoint(base, adapter, tmp_path / "whole", **options)
    monkeypatch.setattr("surgery.procedures.planning.feeding.FED_ELEMENTS", 1)
    monkeypatch.setattr("surgery.api.files.Pace", partial(Pace, tile_elements=1))
    monkeypatch.setattr("surgery.hosts.encoded.TILE_ELEMENTS", 1)
    surgery.merge_checkpoint(base, adapter, tmp_path / "rows", **options)
    assert tensor_hashes(read_tensors(tmp_path / "rows")) == tensor_hashes(read_tensors(tmp_path / "whole"))


@pytest.mark.parametrize("rounding", ["nearest", "feedback"])
def test_probes_tell_the_error_of_outputs_over_the_effect_in_receipt_and_verify(
    rounding: str, adapter: Path, tmp_path: Path
):
    base, out, count = quantized_base(tmp_path / "base", "nf4"), tmp_path / "out", 4096
    options = {"into": "keep", "rounding": rounding, "probes": count, **ANY}
    receipt = surgery.merge_checkpoint(base, adapter, out, **options).receipt
    report = surgery.verify_checkpoint(base, adapter, out, probes=count)
    codec, given = FORMS["nf4"][0], factors()
    with Checkpoint(base) as before, Checkpoint(out) as after:
        for site in before.sites():
            if site.name not in SITES:
                continue
            A, B = (given[f"{site.name}.lora_{letter}.weight"] for letter in "AB")
            delta, H = exact_product(B, A) * (6 / 4), importance(A.double())
            was, became = (codec.decode(one.load(site), torch.float64) for one in (before, after))
            error = became - was - delta
            wanted = math.sqrt(float((error @ H * error).sum() / (delta @ H * delta).sum()))
            told = receipt["changed"][f"{site.name}.weight"]
            # Of the mean of as many squares as there are inputs, 4 standard deviations, in both sums.
            assert told["output_error"] == pytest.approx(wanted, rel=2 * 4 * math.sqrt(2 / count) / 2)
            survival = report.tensors[f"{site.name}.weight"].survival
            assert survival is not None
            assert survival.to_json() == {key: told[key] for key in ("retained", "noise", "output_error")}
    assert 0 < receipt["survived"]["output_error"] < 1
    assert "output_error" not in surgery.verify_checkpoint(base, adapter, out).tensors[f"{SITES[0]}.weight"].to_json()


@pytest.mark.parametrize("tile", [1, 700])
@pytest.mark.parametrize("rounding", ["nearest", "feedback"])
@pytest.mark.parametrize("into", ["keep", "nf4"])
def test_what_probes_tell_does_not_depend_on_the_tiles(
    into: str, rounding: str, tile: int, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    base = quantized_base(tmp_path / "base", "nf4") if into == "keep" else plain_base(tmp_path / "base")
    options = {"into": into, "rounding": rounding, "probes": 5, **ANY}
    whole = surgery.merge_checkpoint(base, adapter, tmp_path / "whole", **options).receipt
    seen: list[Survival] = []
    of = Survival.of
    monkeypatch.setattr(Survival, "of", lambda *args: seen.append(of(*args)) or seen[-1])
    monkeypatch.setattr("surgery.procedures.planning.feeding.FED_ELEMENTS", tile)
    monkeypatch.setattr("surgery.api.files.Pace", partial(Pace, tile_elements=tile))
    monkeypatch.setattr("surgery.hosts.encoded.TILE_ELEMENTS", tile)
    tiled = surgery.merge_checkpoint(base, adapter, tmp_path / "tiled", **options).receipt
    assert len(seen) > 2 * len(SITES)
    assert (tiled["changed"], tiled["survived"]) == (whole["changed"], whole["survived"])


def importance(A: Tensor) -> Tensor:
    """What inputs half of whose energy lies along A make of an error."""
    unit = A / A.norm(dim=1, keepdim=True)
    return torch.eye(A.shape[1], dtype=torch.float64) + A.shape[1] / A.shape[0] * unit.T @ unit


def uneven(folder: Path) -> Path:
    """Of which one site is lost in 4 bits."""
    size = {True: 2.0**-9, False: 8.0}
    return write_adapter(folder, {k: v * size[SITES[2] in k] if "lora_B" in k else v for k, v in factors().items()})


@pytest.mark.parametrize("form", ["nf4", "fp8_block", "keep"])
def test_what_would_be_lost_falls_back_to_16_bits_site_by_site(form: str, tmp_path: Path):
    base = plain_base(tmp_path / "base") if form != "keep" else quantized_base(tmp_path / "base", "nf4")
    adapter, out = uneven(tmp_path / "adapter"), tmp_path / "out"
    loose = {"min_retained": 0.3, "max_noise": 1.5}
    receipt = surgery.merge_checkpoint(
        base, adapter, out, into=form, fallback="16bit", reversible=True, **loose
    ).receipt
    surgery.merge_checkpoint(base, adapter, tmp_path / "16bit")
    surgery.merge_checkpoint(base, adapter, tmp_path / "in", into=form, **ANY)
    assert receipt["fallback"].keys() == {f"{SITES[2]}.weight"}
    plain, held, found = (read_tensors(tmp_path / one) for one in ("16bit", "in", "out"))
    wanted = {k: v for k, v in held.items() if not k.startswith(SITES[2])}
    wanted[f"{SITES[2]}.weight"] = plain[f"{SITES[2]}.weight"]
    assert tensor_hashes(found) == tensor_hashes(wanted)
    told = json.loads((out / "config.json").read_text())["quantization_config"]
    skipped = told.get("llm_int8_skip_modules", told.get("modules_to_not_convert"))
    assert {SITES[2], "lm_head"} <= set(skipped)
    assert not {*SITES[:2], SITES[3]} & set(skipped)
    report = surgery.verify_checkpoint(base, adapter, out)
    assert report.ok
    assert report.counts["bits"] == len(SITES)
    surgery.unmerge_checkpoint(out, tmp_path / "back")
    assert file_hashes(tmp_path / "back") == file_hashes(base)


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
        ("plain", {"fallback": "16bit"}, UsageError, "give into"),
        ("plain", {"into": "nf4", "min_retained": math.nan}, UsageError, "min_retained is 'nan'; a number"),
        ("plain", {"into": "nf4", "max_noise": "1"}, UsageError, "max_noise is '1'; a number"),
        ("plain", {"into": "nf4", "probes": -1}, UsageError, "probes"),
        ("plain", {"rounding": "feedback"}, UsageError, "give into"),
        ("plain", {"min_retained": 0.5}, UsageError, "min_retained is for merges into a format"),
        ("nf4", {"max_noise": 1.0, "into": "16bit"}, UsageError, "max_noise is for merges into a format"),
        ("nf4", {"probes": 8}, UsageError, "probes is for merges into a format"),
        ("plain", {"into": "nf4", "rounding": "up"}, UsageError, "nearest, feedback"),
        ("fp8-rows", {"into": "keep", "fallback": "16bit", "min_retained": 1.1}, FormatError, "fbgemm_fp8"),
        ("plain", {"into": "nf4", "fallback": "16bit", "min_retained": 1.1}, MatchError, "too little there"),
        ("plain", {"into": "w4a16-asym"}, UsageError, "one of"),
        ("plain", {"into": "mxfp4"}, UsageError, "kernels for GPUs"),
        ("plain", {"into": "nf4", "base_as": "nf4"}, UsageError, "base_as"),
        ("plain", {"into": "nf4", "arithmetic": "peft"}, UsageError, "exact"),
        ("plain", {"into": "nf4", "dtype": "float64"}, FormatError, "--dtype bfloat16"),
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
