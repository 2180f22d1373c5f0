"""What peft 0.21.2 matches otherwise than it says, and tensors that it drops: refused here, or read as there."""

import json
from pathlib import Path

import peft
import pytest
import torch
from made_by_peft import ADAPTER, CONFIG, adapted, llama, lora, net, outputs, saved
from safetensors.torch import load_file, save_file
from transformers import (
    DistilBertConfig,
    DistilBertForSequenceClassification,
    LlamaForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

import surgery
from surgery.testing import assert_equivalent


def test_a_tensor_that_finds_no_place_is_refused_where_peft_drops_it(tmp_path: Path) -> None:
    folder = saved(tmp_path / "adapter", lora(target_modules=["0", "1"]))
    tensors = load_file(folder / ADAPTER)
    strayed = {name.replace("model.1.", "model.7."): values for name, values in tensors.items()}
    save_file(strayed, folder / ADAPTER)
    peft.PeftModel.from_pretrained(net(), folder)
    with pytest.raises(surgery.InputError, match="7"):
        surgery.load(net(), folder)


def test_an_entry_that_matches_nothing_is_refused_where_peft_says_nothing() -> None:
    adapted(net(), lora(target_modules=["0", "nowhere"]))
    with pytest.raises(surgery.MatchError, match="nowhere"):
        surgery.inject(net(), surgery.LoraConfig(r=4, target_modules=["0", "nowhere"]))


def test_a_whole_name_escapes_the_choice_of_layers_in_peft_and_is_refused_here() -> None:
    fields = {"target_modules": ["q_proj", "lm_head"], "layers_to_transform": [1]}
    names = [name for name, _ in adapted(llama(), lora(**fields)).named_parameters() if "lora_A" in name]
    assert any("lm_head" in name for name in names)
    with pytest.raises(surgery.MatchError, match=r"'lm_head'.*layers_to_transform"):
        surgery.inject(llama(), surgery.LoraConfig(**fields))


def test_modules_to_save_are_named_by_whole_parts_where_peft_takes_any_end_and_its_files_are_read_so(
    tmp_path: Path,
) -> None:
    ours = surgery.inject(llama(), surgery.LoraConfig(target_modules=["q_proj"], modules_to_save=["norm"]))
    found = {name for name, _ in ours.named_parameters() if "modules_to_save" in name}
    assert found == {"model.norm.modules_to_save.default.weight"}
    surgery.save(ours, tmp_path / "ours")
    assert json.loads((tmp_path / "ours" / CONFIG).read_text())["modules_to_save"] == ["model.norm"]
    theirs = adapted(llama(), lora(modules_to_save=["norm"]))
    names = [name for name, _ in theirs.named_parameters() if "modules_to_save" in name]
    assert any("input_layernorm" in name for name in names)
    with torch.no_grad():
        for name in names:
            theirs.get_parameter(name).mul_(1.5)
    theirs.save_pretrained(tmp_path / "theirs")
    laid = surgery.load(llama(), tmp_path / "theirs")
    assert_equivalent(laid, theirs, torch.arange(9)[None], base=llama())
    surgery.save(laid, tmp_path / "again")
    again = peft.PeftModel.from_pretrained(llama(), tmp_path / "again")
    assert torch.equal(outputs(again), outputs(theirs))
    alike = surgery.inject(llama(), surgery.LoraConfig.from_pretrained(tmp_path / "theirs"), matching="peft")
    assert {name for name, _ in alike.named_parameters() if "modules_to_save" in name} == {
        name.removeprefix("base_model.model.") for name in names
    }
    llama().save_pretrained(tmp_path / "base")
    surgery.merge_checkpoint(tmp_path / "base", tmp_path / "theirs", tmp_path / "out")
    merged = LlamaForCausalLM.from_pretrained(tmp_path / "out").eval()
    assert_equivalent(laid, merged, torch.arange(9)[None], base=llama())
    assert surgery.plan(tmp_path / "base", tmp_path / "theirs").notes == ()


def distilbert() -> DistilBertForSequenceClassification:
    torch.manual_seed(0)
    sizes = {"dim": 16, "hidden_dim": 24, "n_heads": 2, "n_layers": 2, "vocab_size": 29, "num_labels": 3}
    return DistilBertForSequenceClassification(DistilBertConfig(**sizes)).eval()


@pytest.mark.parametrize("tool", ["peft", "surgery"])
def test_all_layers_of_a_new_head_are_saved_and_run_over_a_base_without_one(tool: str, tmp_path: Path) -> None:
    fields = {"r": 4, "target_modules": ["q_lin"], "task_type": "SEQ_CLS", "init_lora_weights": False}
    made = {
        "peft": lambda: peft.get_peft_model(distilbert(), peft.LoraConfig(**fields)).eval(),
        "surgery": lambda: surgery.inject(distilbert(), surgery.LoraConfig(**fields)),
    }[tool]()
    with torch.no_grad():
        for values in made.parameters():
            values.mul_(1.5 if values.requires_grad else 1)
    made.save_pretrained(tmp_path / "adapter")
    given = torch.arange(9)[None]
    for loaded in (
        surgery.load(distilbert(), tmp_path / "adapter"),
        peft.PeftModel.from_pretrained(distilbert(), tmp_path / "adapter").eval(),
    ):
        assert_equivalent(made, loaded, given, base=distilbert())
    distilbert().distilbert.save_pretrained(tmp_path / "base")
    surgery.merge_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    merged = DistilBertForSequenceClassification.from_pretrained(tmp_path / "out").eval()
    assert_equivalent(made, merged, given, base=distilbert())


def test_projections_beside_experts_are_adapted_where_peft_takes_them_for_the_experts(tmp_path: Path) -> None:
    """By the ends of their names, in models such as DeepSeek's and Qwen3's; it drops what the file holds of them."""

    def mixture() -> Qwen3MoeForCausalLM:
        torch.manual_seed(0)
        sizes = {"num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 8}
        sizes |= {"hidden_size": 16, "intermediate_size": 24, "moe_intermediate_size": 8, "vocab_size": 29}
        config = Qwen3MoeConfig(**sizes, num_experts=4, num_experts_per_tok=2, mlp_only_layers=[0])
        return Qwen3MoeForCausalLM(config).eval()

    dense = ["gate_proj", "up_proj", "down_proj"]
    ours = surgery.inject(mixture(), surgery.LoraConfig(r=2, target_modules=dense, init_lora_weights=False))
    surgery.save(ours, tmp_path)
    assert torch.equal(outputs(surgery.load(mixture(), tmp_path, trainable=True)), outputs(ours))
    with pytest.warns(UserWarning, match="missing adapter keys"):
        theirs = peft.PeftModel.from_pretrained(mixture(), tmp_path)
    assert load_file(tmp_path / ADAPTER).keys().isdisjoint(peft.get_peft_model_state_dict(theirs))
