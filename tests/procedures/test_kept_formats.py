"""Merges that keep the format of a quantized base: the nearest codes by its own scales, and what survives there."""

import json
from pathlib import Path

import pytest
import torch
from checkpoint_folders import file_hashes, read_tensors, rewrite, tensor_hashes, write_adapter, write_base
from quantized_folders import FORMATS, SITES, factors, quantized_base, same_bytes
from torch import Tensor

import surgery
from surgery import UsageError
from surgery.adapters.peft import open_adapter
from surgery.codecs import packed_of
from surgery.codecs.bnb4 import Bnb4
from surgery.core.adapter import Weighted
from surgery.core.codec import Packed
from surgery.hosts.checkpoint import Checkpoint
from surgery.procedures.planning.treatment import Treatment
from surgery.procedures.writing.filling import Pace
from surgery.procedures.writing.merge_checkpoint import Options, merge_checkpoint

each_form = pytest.mark.parametrize("form", FORMATS)


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    return write_adapter(tmp_path / "adapter", factors())


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
    with pytest.raises(surgery.CheckError, match=r"retained .*`into=16bit` keeps all"):
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
