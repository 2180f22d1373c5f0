"""What survives of an adapter in a format: measured, fed back, fallen back on 16 bits, and refused."""

import json
import math
from functools import partial
from pathlib import Path

import pytest
import torch
from checkpoint_folders import file_hashes, read_tensors, tensor_hashes, write_adapter
from into_folders import ANY, factors, plain_base
from quantized_folders import SITES, plain_weights, quantized_base
from torch import Tensor

import surgery
from surgery import CheckError, FormatError, MatchError
from surgery.codecs import FORMS
from surgery.core.arithmetic import exact_product
from surgery.core.survival import Survival
from surgery.hosts.checkpoint import Checkpoint
from surgery.procedures.writing.filling import Pace


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    return write_adapter(tmp_path / "adapter", factors())


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
    base = plain_base(tmp_path / "base")
    with pytest.raises(CheckError, match=r"into nf4: .*a merge without `into` keeps all"):
        surgery.merge_checkpoint(base, adapter, tmp_path / "out", into="nf4")
    assert not (tmp_path / "out").exists()
    surgery.merge_checkpoint(base, adapter, tmp_path / "out")


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
    whole = "a merge without `into`" if base == "plain" else "`into=16bit`"
    with pytest.raises(CheckError, match=f"{whole} keeps all of it") as raised:
        surgery.merge_checkpoint(begun, adapter, tmp_path / "out", into=into, **bounds)
    assert ("`fallback=16bit`" in str(raised.value)) is falls
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
