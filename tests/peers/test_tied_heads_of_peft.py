"""`ensure_weight_tying` over an adapted embedding or head: both change alike, beside peft, live and on files."""

import copy
from collections.abc import Sequence
from pathlib import Path

import peft
import pytest
import torch
from made_by_peft import ADAPTER, FILE, adapted, llama, lora, outputs
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaForCausalLM

import surgery
from surgery.io.octets import sha256_of
from surgery.testing import assert_equivalent

EMBEDDING, HEAD = "model.embed_tokens", "lm_head"
TIED = {"ensure_weight_tying": True, "r": 4, "lora_alpha": 6}
X = torch.arange(9)[None]
each_target = pytest.mark.parametrize(
    "targets", [["embed_tokens"], ["lm_head"], ["embed_tokens", "lm_head", "q_proj"]], ids=str
)


def tied(dtype: torch.dtype = torch.float32) -> LlamaForCausalLM:
    return llama(dtype, tie_word_embeddings=True)


def trained(model: nn.Module) -> nn.Module:
    """As if: the factors of embeddings and of plain layers are random."""
    torch.manual_seed(2)
    with torch.no_grad():
        for name, values in model.named_parameters():
            if "lora_" in name and f"{HEAD}." not in name:
                values.copy_(torch.randn_like(values) / 3)
    return model


def by_peft(folder: Path, targets: Sequence[str] = (EMBEDDING,), copies: bool = False) -> peft.PeftModel:
    """`copies`, its default: beside the factors it saves the base's own embedding and head."""
    theirs = trained(adapted(tied(), lora(target_modules=list(targets), **TIED))).eval()
    theirs.save_pretrained(folder, save_embedding_layers=copies)
    return theirs


def hashes(file: Path) -> dict[str, str]:
    return {name: sha256_of(values) for name, values in load_file(file).items()}


def ours(**fields: object) -> nn.Module:
    config = surgery.LoraConfig(**{"target_modules": ["embed_tokens", "q_proj"], **TIED} | fields)
    return surgery.inject(tied(), config)


@each_target
def test_files_go_both_ways_with_the_same_tensors_and_outputs(targets: list[str], tmp_path: Path) -> None:
    theirs = by_peft(tmp_path / "theirs", targets)
    laid = surgery.load(tied(), tmp_path / "theirs", trainable=True)
    assert_equivalent(laid, theirs, X, base=tied())
    assert not any(HEAD in name for name, _ in laid.named_parameters())
    surgery.save(laid, tmp_path / "ours")
    laid.save_pretrained(tmp_path / "named", state_dict=laid.state_dict())
    assert hashes(tmp_path / "ours" / ADAPTER) == hashes(tmp_path / "theirs" / ADAPTER)
    assert (tmp_path / "ours" / ADAPTER).read_bytes() == (tmp_path / "named" / ADAPTER).read_bytes()
    again = peft.PeftModel.from_pretrained(tied(), tmp_path / "ours").eval()
    assert torch.equal(outputs(again), outputs(theirs))


@each_target
def test_a_fresh_one_changes_nothing_and_trains_one_pair_by_the_gradients_of_both(
    targets: list[str], tmp_path: Path
) -> None:
    fresh = ours(target_modules=targets)
    assert torch.equal(outputs(fresh), outputs(tied()))
    assert {name for name in dict(fresh.named_parameters()) if "lora_" in name and "q_proj" not in name} == {
        f"{EMBEDDING}.lora_embedding_{role}.default" for role in "AB"
    }
    theirs = by_peft(tmp_path, targets)
    laid = surgery.load(tied(), tmp_path, trainable=True)
    for model in (theirs, laid):
        model(X)[0].square().mean().backward()
    own = theirs.base_model.model.model.embed_tokens, theirs.base_model.model.lm_head
    for role, other in (("A", "B"), ("B", "A")):
        apart = getattr(own[0], f"lora_embedding_{role}")["default"].grad
        turned = getattr(own[1], f"lora_{other}")["default"].weight.grad.T
        found = laid.get_parameter(f"{EMBEDDING}.lora_embedding_{role}.default").grad
        near = {"rtol": 0.0, "atol": 64 * 29 * torch.finfo(torch.float32).eps * float(found.abs().max())}
        torch.testing.assert_close(found, apart + turned, **near)  # sums of at most 29 terms, in about 64 steps


@pytest.mark.parametrize("copies", [False, True], ids=["factors", "factors and copies"])
def test_a_merge_keeps_them_tied_live_and_on_files_and_is_undone(copies: bool, tmp_path: Path) -> None:
    by_peft(tmp_path / "adapter", copies=copies)
    base = tmp_path / "base"
    tied().save_pretrained(base)
    plan = surgery.plan(base, tmp_path / "adapter")
    assert [one.site.weight.name for one in plan.changes] == [f"{EMBEDDING}.weight"]
    assert any("stays tied" in note for note in plan.notes)
    surgery.merge_checkpoint(base, tmp_path / "adapter", tmp_path / "out", reversible=True)
    surgery.verify_checkpoint(base, tmp_path / "adapter", tmp_path / "out", outputs=True).require()
    merged = LlamaForCausalLM.from_pretrained(tmp_path / "out").eval()
    assert merged.lm_head.weight is merged.model.embed_tokens.weight
    laid = surgery.load(tied(), tmp_path / "adapter")
    assert_equivalent(laid, merged, X, base=tied())
    held = {name: values.clone() for name, values in laid.state_dict().items()}
    surgery.save_merged(laid, tmp_path / "live")
    assert hashes(tmp_path / "live" / FILE) == hashes(tmp_path / "out" / FILE)
    surgery.unmerge(surgery.merge(laid))
    assert all(torch.equal(values, held[name]) for name, values in laid.state_dict().items())
    kept = surgery.eject(surgery.merge(laid), keep_merged=True)
    assert torch.equal(outputs(kept), outputs(merged))
    assert kept.lm_head.weight is kept.model.embed_tokens.weight
    surgery.unmerge_checkpoint(tmp_path / "out", tmp_path / "back")
    assert (tmp_path / "back" / FILE).read_bytes() == (base / FILE).read_bytes()


@pytest.mark.parametrize("safe", [False, True], ids=["merge", "safe_merge"])
def test_a_merge_by_peft_adds_the_delta_of_tied_weights_twice_and_is_different(safe: bool, tmp_path: Path) -> None:
    theirs = by_peft(tmp_path / "adapter")
    tied().save_pretrained(tmp_path / "base")
    wanted = outputs(theirs)
    delta = theirs.base_model.model.model.embed_tokens.get_delta_weight("default").detach()
    merged = theirs.merge_and_unload(safe_merge=safe)
    assert (outputs(merged) - wanted).abs().max() > 0.1
    twice = tied().model.embed_tokens.weight + 2 * delta
    near = {"rtol": 0.0, "atol": 4 * torch.finfo(torch.float32).eps * float(twice.abs().max())}
    torch.testing.assert_close(merged.lm_head.weight, twice, **near)
    merged.save_pretrained(tmp_path / "out")
    judged = surgery.verify_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    assert [name for name, one in judged.tensors.items() if one.grade == "different"] == [f"{EMBEDDING}.weight"]


def test_factors_that_are_not_each_other_turned_lie_apart_as_they_were_trained(tmp_path: Path) -> None:
    theirs = by_peft(tmp_path / "adapter")
    tensors = load_file(tmp_path / "adapter" / ADAPTER)
    name = "base_model.model.lm_head.lora_A.weight"
    save_file(tensors | {name: tensors[name] * 2}, tmp_path / "adapter" / ADAPTER)
    with torch.no_grad():
        head = theirs.base_model.model.lm_head.lora_A["default"]
        head.weight = nn.Parameter(head.weight * 2)
    laid = surgery.load(tied(), tmp_path / "adapter")
    assert_equivalent(laid, theirs, X, base=tied())
    tied().save_pretrained(tmp_path / "base")
    for merge in (
        lambda: surgery.merge(laid),
        lambda: surgery.merge_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "out"),
    ):
        with pytest.raises(surgery.MatchError, match="tied to"):
            merge()
    surgery.merge_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "out", tied="untie")
    assert_equivalent(laid, LlamaForCausalLM.from_pretrained(tmp_path / "out"), X, base=tied())


@pytest.mark.parametrize("method", ["cat", "svd", "linear", "dare_ties"])
def test_a_combination_stays_tied_and_peft_gives_its_outputs(method: str, tmp_path: Path) -> None:
    folders = [tmp_path / name for name in "ab"]
    for seed, folder in enumerate(folders):
        by_peft(folder, ["embed_tokens", "q_proj"])
        tensors = load_file(folder / ADAPTER)
        save_file({name: values * (seed + 1) for name, values in tensors.items()}, folder / ADAPTER)
    options = {} if method in {"cat", "linear"} else {"rank": 3} if method == "svd" else {"density": 0.5}
    surgery.combine([(folders[0], 0.5), (folders[1], 0.25)], tmp_path / "sum", method=method, **options)
    laid = surgery.load(tied(), tmp_path / "sum")
    assert not any(HEAD in name for name, _ in laid.named_parameters())
    assert_equivalent(laid, peft.PeftModel.from_pretrained(tied(), tmp_path / "sum"), X, base=tied())
    tied().save_pretrained(tmp_path / "base")
    surgery.merge_checkpoint(tmp_path / "base", tmp_path / "sum", tmp_path / "out")
    assert_equivalent(laid, LlamaForCausalLM.from_pretrained(tmp_path / "out"), X, base=tied())


def gpt2() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    sizes = {"n_embd": 16, "n_layer": 1, "n_head": 2, "vocab_size": 29, "bos_token_id": 0, "eos_token_id": 0}
    return GPT2LMHeadModel(GPT2Config(**sizes)).eval()


def test_what_peft_ties_by_no_name_of_its_own_is_read_as_it_was_trained_and_tied_when_new(tmp_path: Path) -> None:
    """To it embeddings are called embed_tokens and lm_head; of wte it adapts that alone, and warns."""
    theirs = trained(adapted(gpt2(), lora(target_modules=["wte"], **TIED)))
    theirs.save_pretrained(tmp_path / "theirs")
    assert_equivalent(surgery.load(gpt2(), tmp_path / "theirs"), theirs, X, base=gpt2())
    new = trained(surgery.inject(gpt2(), surgery.LoraConfig(target_modules=["wte"], **TIED)))
    surgery.save(new, tmp_path / "ours")
    again = peft.PeftModel.from_pretrained(gpt2(), tmp_path / "ours").eval()
    assert_equivalent(new, again, X, base=gpt2())
    assert len(load_file(tmp_path / "ours" / ADAPTER)) == 2 * len(load_file(tmp_path / "theirs" / ADAPTER))


def test_a_combination_with_one_that_is_not_tied_is_the_sum_apart(tmp_path: Path) -> None:
    by_peft(tmp_path / "a")
    surgery.save(ours(ensure_weight_tying=False, target_modules=[EMBEDDING], init_lora_weights=False), tmp_path / "b")
    surgery.combine([tmp_path / "a", tmp_path / "b"], tmp_path / "sum")
    both = surgery.load(tied(), tmp_path / "a", adapter_name="a")
    surgery.load(both, tmp_path / "b", adapter_name="b")
    surgery.set_adapter(both, ["a", "b"])
    assert_equivalent(both, surgery.load(tied(), tmp_path / "sum"), X, base=tied())
    with pytest.raises(surgery.MatchError, match="tied to lm_head"):
        surgery.merge(both)


def test_it_is_copied_swapped_mixed_deleted_and_ejected_as_others(tmp_path: Path) -> None:
    by_peft(tmp_path / "a")
    other = trained(ours(target_modules=[EMBEDDING], lora_alpha=3))
    surgery.save(other, tmp_path / "b")
    model = surgery.load(tied(), tmp_path / "a")
    alone = outputs(model)
    assert torch.equal(outputs(copy.deepcopy(model)), alone)
    model.load_adapter(tmp_path / "b", adapter_name="default", hotswap=True)
    assert torch.equal(outputs(model), outputs(other))
    model.load_adapter(tmp_path / "a", adapter_name="default", hotswap=True)
    assert torch.equal(outputs(model), alone)
    surgery.load(model, tmp_path / "b", adapter_name="b")
    with surgery.mixed_batch(model, ["b", "__base__", "default"]):
        mixed = model(X.expand(3, -1)).logits
    for row, wanted in zip(mixed, (outputs(other), outputs(tied()), alone), strict=True):
        near = {"rtol": 0.0, "atol": 64 * 29 * torch.finfo(torch.float32).eps * float(wanted.abs().max())}
        torch.testing.assert_close(row, wanted[0], **near)
    model.delete_adapter("b")
    assert torch.equal(outputs(model), alone)
    back = surgery.eject(model)
    assert torch.equal(outputs(back), outputs(tied()))
    assert type(back.lm_head) is nn.Linear


REFUSED = {
    "dora": ({"use_dora": True}, "one plain LoRA"),
    "pissa": ({"init_lora_weights": "pissa"}, "one plain LoRA"),
    "another rank": ({"rank_pattern": {"lm_head": 2}, "target_modules": ["embed_tokens", "lm_head"]}, "same r"),
    "a copy": ({"modules_to_save": ["lm_head"]}, "modules_to_save holds a copy"),
}


@pytest.mark.parametrize(("fields", "told"), REFUSED.values(), ids=REFUSED.keys())
def test_what_cannot_be_tied_is_refused_by_name(fields: dict[str, object], told: str) -> None:
    with pytest.raises(surgery.MatchError, match=told):
        ours(**fields)


def test_weights_that_two_embeddings_share_have_the_factors_of_the_first() -> None:
    model = nn.ModuleDict({"a": nn.Embedding(8, 4), "b": nn.Embedding(8, 4)})
    model["b"].weight = model["a"].weight
    fields = {"r": 2, "ensure_weight_tying": True, "init_lora_weights": False}
    laid = surgery.inject(model, surgery.LoraConfig(**fields, target_modules=["b"]))
    assert [name for name, _ in laid.named_parameters() if "lora_" in name] == [
        f"a.lora_embedding_{role}.default" for role in "AB"
    ]
    tokens = torch.arange(8)
    assert torch.equal(laid["a"](tokens), laid["b"](tokens))
    kept = surgery.eject(surgery.merge(laid), keep_merged=True)
    assert kept["a"].weight is kept["b"].weight


def test_weights_that_a_convolution_shares_are_refused() -> None:
    model = nn.ModuleDict({"a": nn.Conv1d(4, 8, 1), "b": nn.Conv1d(4, 8, 1)})
    model["b"].weight = model["a"].weight
    with pytest.raises(surgery.MatchError, match="Embeddings and Linears are wanted"):
        surgery.inject(model, surgery.LoraConfig(r=2, target_modules=["a"], ensure_weight_tying=True))


def test_a_merge_as_peft_is_refused_for_that_counts_twice(tmp_path: Path) -> None:
    by_peft(tmp_path / "adapter")
    tied().save_pretrained(tmp_path / "base")
    with pytest.raises(surgery.ConfigError, match="tied weights twice"):
        surgery.merge(surgery.load(tied(), tmp_path / "adapter"), arithmetic="peft")
    with pytest.raises(surgery.ConfigError, match="tied weights twice"):
        surgery.merge_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "out", arithmetic="peft")
