"""Plain bases merged as the form that an adapter was trained over."""

from pathlib import Path

import pytest
import torch
from checkpoint_folders import file_hashes, read_tensors, tensor_hashes, write_adapter, write_base
from quantized_folders import SITES, factors, plain_weights, quantized_base, same_bytes

import surgery
from surgery import UsageError
from surgery.codecs import FORMS


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    return write_adapter(tmp_path / "adapter", factors())


LORA = {"A": (4, 128), "B": (160, 4)}


@pytest.mark.parametrize("form", ["nf4", "nf4-double", "int8"])
def test_a_plain_base_is_merged_as_the_form_that_the_adapter_was_trained_over(form: str, tmp_path: Path) -> None:
    """As if it were merged into the quantized base itself, at the sites of the adapter."""
    plain = {f"{site}.weight": one for site, one in plain_weights().items()}
    write_base(tmp_path / "plain", plain, config={"model_type": "llama", "dtype": "bfloat16"})
    adapter, out = write_adapter(tmp_path / "a", factors()), tmp_path / "out"
    report = surgery.merge_checkpoint(tmp_path / "plain", adapter, out, base_as=form, reversible=True)
    surgery.merge_checkpoint(quantized_base(tmp_path / "base", form), adapter, tmp_path / "wanted")
    found, wanted = read_tensors(out), read_tensors(tmp_path / "wanted")
    for site in SITES[:3]:
        assert same_bytes(found[f"{site}.weight"], wanted[f"{site}.weight"])
    assert same_bytes(found[f"{SITES[3]}.weight"], plain[f"{SITES[3]}.weight"])
    assert any(f"3 weights are merged as they read from {form}; 1 other" in note for note in report.receipt["notes"])
    assert report.receipt["options"]["base_as"] == form
    assert surgery.verify_checkpoint(tmp_path / "plain", adapter, out, base_as=form).counts["bits"] == 3
    assert surgery.verify_checkpoint(tmp_path / "plain", adapter, out).counts["bits"] == 3  # as its receipt tells
    surgery.unmerge_checkpoint(out, tmp_path / "back")
    assert file_hashes(tmp_path / "back") == file_hashes(tmp_path / "plain")
    (out / "surgery.receipt.json").unlink()
    assert not surgery.verify_checkpoint(tmp_path / "plain", adapter, out).ok


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
