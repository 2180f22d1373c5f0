"""Adapters go to peft and come from it with equal outputs; its merges pass verify."""

import copy
from pathlib import Path

import peft
import pytest
import torch
from torch import Tensor, nn
from transformers import BertConfig, BertModel, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

import surgery

SMALL = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 99}
GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 99, "tie_word_embeddings": False}
MODELS = {
    "llama": (lambda: LlamaForCausalLM(LlamaConfig(**SMALL)), ["q_proj", "down_proj"]),
    "gpt2": (lambda: GPT2LMHeadModel(GPT2Config(**GPT2)), ["c_attn", "c_proj", "wte"]),
    "bert": (lambda: BertModel(BertConfig(**SMALL)), ["query", "word_embeddings"]),
}


def outputs(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(torch.arange(12)[None])[0]


@pytest.fixture(params=list(MODELS))
def given(request: pytest.FixtureRequest) -> tuple[nn.Module, list[str]]:
    torch.manual_seed(0)
    make, targets = MODELS[request.param]
    return make().eval(), targets


def test_an_adapter_saved_here_gives_equal_outputs_in_peft(given: tuple[nn.Module, list[str]], tmp_path: Path) -> None:
    model, targets = given
    other = copy.deepcopy(model)
    config = surgery.LoraConfig(r=4, rank_pattern={targets[0]: 2}, target_modules=targets, init_lora_weights=False)
    surgery.save(surgery.inject(model, config), tmp_path)
    assert torch.equal(outputs(peft.PeftModel.from_pretrained(other, tmp_path).eval()), outputs(model))


@pytest.mark.parametrize("options", [{}, {"use_rslora": True}, {"alpha_pattern": {"c_attn": 3, "query": 5}}])
def test_an_adapter_saved_by_peft_gives_equal_outputs_here(
    given: tuple[nn.Module, list[str]], tmp_path: Path, options: dict[str, object]
) -> None:
    model, targets = given
    config = peft.LoraConfig(r=4, target_modules=targets, init_lora_weights=False, **options)
    theirs = peft.get_peft_model(copy.deepcopy(model), config).eval()
    theirs.save_pretrained(tmp_path)
    ours, wanted = outputs(surgery.load(model, tmp_path)), outputs(theirs)
    # peft multiplies by the scaling and then adds; here both are one operation with one rounding less. That is
    # the same for powers of two, and else an ulp at each of at most 12 adapted layers, each a sum of 64 terms.
    ulps = 12 * 64 if "alpha_pattern" in options else 0
    bound = ulps * torch.finfo(wanted.dtype).eps * wanted.abs().max().item()
    torch.testing.assert_close(ours, wanted, rtol=0, atol=bound)


def test_a_merge_by_peft_passes_verify_and_another_adapter_does_not(
    given: tuple[nn.Module, list[str]], tmp_path: Path
) -> None:
    model, targets = given
    model.save_pretrained(tmp_path / "base")
    for name in ("adapter", "other"):
        config = peft.LoraConfig(r=4, target_modules=targets, init_lora_weights=False)
        theirs = peft.get_peft_model(copy.deepcopy(model), config)
        theirs.save_pretrained(tmp_path / name)
        theirs.merge_and_unload().save_pretrained(tmp_path / f"{name}-merged")
    assert surgery.verify_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "adapter-merged").ok
    assert not surgery.verify_checkpoint(tmp_path / "base", tmp_path / "other", tmp_path / "adapter-merged").ok
