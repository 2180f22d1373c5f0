"""Embeddings that files hold under another name, or under that of the head: FSMT's, BLT's, OpenAIGPTDoubleHeads'."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import transformers
from safetensors import safe_open
from torch import nn

import surgery


class Family(NamedTuple):
    made: Callable[[], nn.Module]
    held: str  # the one module whose weight is in the files
    others: tuple[str, ...]  # those that share it
    inputs: Mapping[str, Any]


def double_heads() -> nn.Module:
    sizes = {"vocab_size": 99, "n_positions": 40, "n_embd": 16, "n_layer": 2, "n_head": 2}
    return transformers.OpenAIGPTDoubleHeadsModel(transformers.OpenAIGPTConfig(**sizes))


def fsmt() -> nn.Module:
    sides = {"layers": 1, "attention_heads": 2, "ffn_dim": 32}
    sizes = {f"{side}_{name}": one for side in ("encoder", "decoder") for name, one in sides.items()}
    words = {"langs": ["en", "de"], "src_vocab_size": 99, "tgt_vocab_size": 99, "max_position_embeddings": 40}
    config = transformers.FSMTConfig(**sizes, **words, d_model=16, tie_word_embeddings=True)
    return transformers.FSMTForConditionalGeneration(config)


def blt() -> nn.Module:
    part = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    part |= {"num_key_value_heads": 2, "vocab_size": 260}
    local = part | {"cross_attn_k": 2, "hidden_size_global": 32}
    hashed = {"vocab": 50, "size": [3], "nb_functions": 1}
    config = transformers.BltConfig(
        vocab_size=260,
        tie_word_embeddings=True,
        patch_in_forward=False,
        patcher_config=part,
        encoder_config=local,
        decoder_config=local,
        global_config=part | {"hidden_size": 32},
        cross_attn_k=2,
        max_position_embeddings=64,
        **{f"encoder_hash_byte_group_{name}": one for name, one in hashed.items()},
    )
    return transformers.BltForCausalLM(config)


TOKENS = torch.arange(3, 15)
FAMILIES = {
    "double heads": Family(
        double_heads,
        "lm_head",
        ("transformer.tokens_embed",),
        {"input_ids": TOKENS.expand(1, 2, -1), "mc_token_ids": torch.tensor([[11, 11]])},
    ),
    "FSMT": Family(
        fsmt,
        "model.decoder.embed_tokens",
        ("model.decoder.output_projection", "model.encoder.embed_tokens"),
        {"input_ids": TOKENS[None]},
    ),
    "BLT": Family(
        blt, "lm_head", ("model.local_encoder.embed_tokens",), {"input_ids": TOKENS[None], "use_cache": False}
    ),
}
each_family = pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES.keys())


def saved(family: Family, folder: Path) -> Callable[[Path], nn.Module]:
    """What reads its models; and a base, which holds one of the modules alone."""
    torch.manual_seed(0)
    model = family.made()
    model.save_pretrained(folder)
    with safe_open(folder / "model.safetensors", "pt") as file:
        names = {name.removesuffix(".weight") for name in file.keys()}  # noqa: SIM118  # no mapping
    assert family.held in names
    assert not names & set(family.others)
    return lambda place: type(model).from_pretrained(place).eval()


def adapter(model: nn.Module, folder: Path, targets: list[str], **fields: Any) -> nn.Module:
    torch.manual_seed(1)
    config = surgery.LoraConfig(r=2, lora_alpha=1, init_lora_weights=False, target_modules=targets, **fields)
    laid = surgery.inject(model, config).eval()
    surgery.save(laid, folder)
    return laid


def same(merged: nn.Module, laid: nn.Module, base: nn.Module, inputs: Mapping[str, Any]) -> None:
    """FSMT does not run in float64; sums here are of at most 32 terms, in about 64 steps."""
    with torch.no_grad():
        found, wanted, before = (model(**inputs)[0] for model in (merged, laid, base))
        assert torch.equal(found, surgery.merge(laid)(**inputs)[0])
    room = 64 * 32 * torch.finfo(torch.float32).eps * float(wanted.abs().max())
    assert float((found - wanted).abs().max()) <= room
    assert float((before - wanted).abs().max()) > 10 * room


@each_family
def test_one_adapter_for_all_that_share_it_is_merged_once_and_comes_back(family: Family, tmp_path: Path) -> None:
    read, base, out = saved(family, tmp_path / "base"), tmp_path / "base", tmp_path / "out"
    targets = [family.held, *family.others]
    laid = adapter(read(base), tmp_path / "adapter", targets, ensure_weight_tying=True)
    report = surgery.merge_checkpoint(base, tmp_path / "adapter", out, reversible=True)
    assert list(report.receipt["changed"]) == [f"{family.held}.weight"]
    assert "the shared embedding changes once, and the modules that it is stay tied to it" in report.plan.notes
    merged = read(out)
    for other in family.others:
        assert merged.get_submodule(other).weight is merged.get_submodule(family.held).weight
    same(merged, laid, read(base), family.inputs)
    assert surgery.verify_checkpoint(base, tmp_path / "adapter", out).counts["bits"] == 1
    surgery.unmerge_checkpoint(out, tmp_path / "back")
    assert (tmp_path / "back" / "model.safetensors").read_bytes() == (base / "model.safetensors").read_bytes()


@each_family
def test_an_adapter_of_one_of_them_is_refused_with_the_others(family: Family, tmp_path: Path) -> None:
    read, base = saved(family, tmp_path / "base"), tmp_path / "base"
    for number, target in enumerate([family.held, *family.others]):
        adapter(read(base), tmp_path / f"{number}", [target])
        told = rf"{family.held}.*(is tied to|are tied to|leaves .* alone).*apart first"
        with pytest.raises(surgery.MatchError, match=told):
            surgery.merge_checkpoint(base, tmp_path / f"{number}", tmp_path / "out")


@each_family
def test_a_base_that_was_saved_with_them_apart_takes_an_adapter_of_one(family: Family, tmp_path: Path) -> None:
    """The step that the refusal names."""
    read, apart, out = saved(family, tmp_path / "base"), tmp_path / "apart", tmp_path / "out"
    model: Any = read(tmp_path / "base")
    for one in family.others:
        module = model.get_submodule(one)
        module.weight = nn.Parameter(module.weight.detach().clone())
    model.config.tie_word_embeddings, model.all_tied_weights_keys = False, {}
    model.save_pretrained(apart)
    for number, target in enumerate([family.held, *family.others]):
        laid = adapter(read(apart), tmp_path / f"{number}", [target])
        surgery.merge_checkpoint(apart, tmp_path / f"{number}", out, overwrite=number > 0)
        same(read(out), laid, read(apart), family.inputs)
