"""Merges by peft 0.21.2 that are not what its adapters compute, or not undone, and what surgery says or does instead.

What is wrong on disk is graded different; what is right by other roundings, rounding.
"""

import copy
import json
from pathlib import Path

import peft
import pytest
import torch
from made_by_peft import CONFIG, FILE, adapted, each_half, llama, lora, net, outputs, saved
from safetensors.torch import load_file, save_file
from torch import nn

import surgery
from surgery.io.octets import sha256_of


@pytest.mark.parametrize("targets", [["embed_tokens"], ["lm_head"]])
def test_a_merge_into_one_of_two_tied_weights_is_different(targets: list[str], tmp_path: Path) -> None:
    model = llama(tie_word_embeddings=True)
    model.save_pretrained(tmp_path / "base")
    theirs = adapted(model, lora(target_modules=targets))
    wanted = outputs(theirs)
    theirs.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    merged = theirs.merge_and_unload()
    assert (outputs(merged) - wanted).abs().max() > 0.1  # it does not compute what it did
    merged.save_pretrained(tmp_path / "out")
    report = surgery.verify_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    assert not report.ok
    with pytest.raises(surgery.MatchError, match="tied"):
        surgery.merge_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "ours")


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_a_start_that_changes_the_base_does_so_again_in_peft_and_its_merge_is_different(
    init: str, tmp_path: Path
) -> None:
    model, weight = llama(), "model.layers.0.self_attn.q_proj.weight"
    model.save_pretrained(tmp_path / "base")
    folder = saved(tmp_path / "adapter", lora(init_lora_weights=init), model)
    back = peft.PeftModel.from_pretrained(copy.deepcopy(model), folder)
    back.merge_and_unload().save_pretrained(tmp_path / "out")
    back = peft.PeftModel.from_pretrained(copy.deepcopy(model), folder).unload()
    assert not torch.equal(back.get_parameter(weight), model.get_parameter(weight))
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps(config | {"init_lora_weights": True}))  # without what has it refused
    judged = surgery.verify_checkpoint(tmp_path / "base", folder, tmp_path / "out")
    assert judged.counts["different"] == 2
    assert judged.tensors[weight].grade == "different"


def test_a_merge_of_attention_counts_out_proj_twice_in_peft_and_is_different_where_once_is_meant(
    tmp_path: Path,
) -> None:
    torch.manual_seed(0)
    model = nn.ModuleDict({"attn": nn.MultiheadAttention(8, 2)})
    (tmp_path / "base").mkdir()
    (tmp_path / "out").mkdir()
    save_file(model.state_dict(), tmp_path / "base" / FILE)
    theirs = adapted(model, lora(target_modules=["attn"]))
    theirs.save_pretrained(tmp_path / "adapter")
    save_file(theirs.merge_and_unload().state_dict(), tmp_path / "out" / FILE)
    folders = tmp_path / "base", tmp_path / "adapter", tmp_path / "out"
    surgery.verify_checkpoint(*folders, mha_out_proj_scale=2).require()
    judged = surgery.verify_checkpoint(*folders, mha_out_proj_scale=1).tensors.items()
    assert [name for name, one in judged if one.grade == "different"] == ["attn.out_proj.weight"]


@each_half
def test_merges_safe_or_not_with_factors_in_one_dtype_or_another_differ_and_are_all_graded_rounding(
    dtype: torch.dtype, tmp_path: Path
) -> None:
    model, found = llama(dtype), {}
    model.save_pretrained(tmp_path / "base")
    for safe in (False, True):
        for autocast in (False, True):
            out = tmp_path / f"{safe}-{autocast}"
            theirs = adapted(model, lora(), autocast_adapter_dtype=autocast)
            theirs.save_pretrained(out / "adapter")
            theirs.merge_and_unload(safe_merge=safe).save_pretrained(out)
            report = surgery.verify_checkpoint(tmp_path / "base", out / "adapter", out)
            assert report.ok
            assert report.counts["bits"] + report.counts["rounding"] == 2
            assert report.counts["rounding"] or not safe  # where the delta is rounded first
            found[safe, autocast] = load_file(out / FILE)["model.layers.0.self_attn.q_proj.weight"]
    assert not torch.equal(found[False, True], found[True, True])  # of the same adapter


def test_layers_that_share_one_weight_are_merged_into_it_by_peft_and_the_outputs_are_lost() -> None:
    theirs = adapted(llama(), lora(layer_replication=[(0, 2), (1, 2)])).eval()
    wanted = outputs(theirs)
    merged = theirs.merge_and_unload()  # ours refuses it: test_layer_replication
    eps = torch.finfo(torch.float32).eps
    assert (outputs(merged) - wanted).abs().max() > 1e4 * eps * wanted.abs().max()


@each_half
def test_peft_does_not_bring_back_what_it_merged_and_we_do(dtype: torch.dtype, tmp_path: Path) -> None:
    model = net().to(dtype)
    theirs = adapted(model, lora(target_modules=["0"]))
    theirs.save_pretrained(tmp_path)
    theirs.merge_adapter()
    theirs.unmerge_adapter()
    assert not torch.equal(theirs.base_model.model[0].base_layer.weight, model[0].weight)
    ours = surgery.merge(surgery.load(copy.deepcopy(model), tmp_path))
    assert torch.equal(surgery.eject(surgery.unmerge(ours))[0].weight, model[0].weight)


def test_a_merge_that_fails_leaves_all_as_it_was_where_peft_leaves_half(tmp_path: Path) -> None:
    theirs = adapted(net(), lora(target_modules=["0", "1"]))
    theirs.save_pretrained(tmp_path)
    before = {name: sha256_of(values) for name, values in net().state_dict().items()}
    ours = surgery.load(net(), tmp_path)
    for model in (theirs, ours):
        next(values for name, values in model.named_parameters() if "1.lora_B" in name).data[0] = torch.nan
    with pytest.raises(ValueError, match="NaN"):
        theirs.merge_adapter(safe_merge=True)
    assert sha256_of(theirs.base_model.model[0].base_layer.weight) != before["0.weight"]
    with pytest.raises(surgery.ValueRangeError):
        surgery.merge(ours)
    assert {name: sha256_of(values) for name, values in surgery.eject(ours).state_dict().items()} == before


def test_a_merge_of_one_of_two_switches_the_other_off_in_peft_and_ours_merges_what_runs(tmp_path: Path) -> None:
    model, x = net(), torch.randn(3, 8)
    theirs = adapted(model, lora(target_modules=["0"]), adapter_name="a")
    theirs.add_adapter("b", lora(target_modules=["0"]))
    theirs.base_model.set_adapter(["a", "b"])
    theirs.save_pretrained(tmp_path)
    wanted = theirs(x).detach()
    theirs.merge_adapter(["a"])
    assert (theirs(x) - wanted).abs().max() > 0.1
    ours = copy.deepcopy(model)
    for name in "ab":
        surgery.load(ours, tmp_path / name, adapter_name=name)
    surgery.set_adapter(ours, ["a", "b"])
    # Two deltas on a grid of 22 bits, r = 4; then sums of 8 terms in each of two layers.
    room = 2 * 8 * (4 * 2.0**-21 + 8 * torch.finfo(torch.float32).eps) * float(wanted.abs().max() + 1)
    assert (ours(x) - wanted).abs().max() < room
    assert (surgery.merge(ours)(x) - wanted).abs().max() < room


@each_half
def test_a_merge_of_attention_in_a_half_type_replaces_the_memory_of_the_factors_in_peft_alone(
    dtype: torch.dtype, tmp_path: Path
) -> None:
    model = nn.ModuleDict({"attn": nn.MultiheadAttention(8, 2)}).to(dtype)
    theirs = adapted(model, lora(target_modules=["attn"]), autocast_adapter_dtype=False)
    theirs.save_pretrained(tmp_path)
    ours = surgery.load(model, tmp_path, trainable=True)
    kept = []
    for one, merge in ((theirs, theirs.merge_adapter), (ours, lambda: surgery.merge(ours))):
        held = [values for name, values in one.named_parameters() if "lora_" in name]
        before = [values.data_ptr() for values in held]
        merge()
        kept.append(before == [values.data_ptr() for values in held])
    assert kept == [False, True]


def test_one_adapter_combined_alone_is_itself_where_that_of_peft_is_not(tmp_path: Path) -> None:
    model = net()
    theirs = adapted(model, lora(target_modules=["0"], use_rslora=True))
    theirs.save_pretrained(tmp_path / "adapter")
    theirs.add_weighted_adapter(["default"], [1.0], "alone", combination_type="linear")
    deltas = [theirs.base_model.model[0].get_delta_weight(name) for name in ("default", "alone")]
    assert not torch.allclose(*deltas)
    report = surgery.combine([(tmp_path / "adapter", 1.0)], tmp_path / "alone", method="linear")
    assert report.relative_error is not None
    assert report.relative_error < 4 * torch.finfo(torch.float32).eps
