"""The table of docs/from-peft.md: of each row both calls are run, one after another, and give the same outputs."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import surgery

PAGE = Path(__file__).parents[2] / "docs" / "from-peft.md"
SMALL = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 99}
TOKENS = torch.arange(24).reshape(2, 12)
ROWS = re.findall(r"^\| `(.+?)` \| `(.+?)` \|$", PAGE.read_text(), flags=re.MULTILINE)
AT_ONCE = 16 * torch.finfo(torch.float32).eps  # a merge rounds each weight once, and both add up in other orders


def names(base: Path, **more: Any) -> dict[str, Any]:
    peft = pytest.importorskip("peft")
    model = AutoModelForCausalLM.from_pretrained(base)
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"])
    return {**vars(peft), "model": model, "config": config, "x": TOKENS, **more}


def outputs(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(TOKENS).logits


def test_both_calls_of_each_row_give_the_same_outputs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    peft = pytest.importorskip("peft")
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**SMALL)).save_pretrained("base")
    fresh = {"r": 4, "target_modules": ["q_proj", "v_proj"], "init_lora_weights": False}
    made = peft.get_peft_model(AutoModelForCausalLM.from_pretrained("base"), peft.LoraConfig(**fresh))
    made.save_pretrained("adapter")
    theirs, ours = names(Path("base")), names(Path("base"), surgery=surgery)
    assert len(ROWS) >= 15
    for there, here in ROWS:
        told = []
        for code, run in ((there, theirs), (here, ours)):
            exec(code, run)
            keys = {key.removeprefix("base_model.model.") for key in run.get("tensors", ())}
            told.append((capsys.readouterr().out, outputs(run["model"]), keys))
        (said, wanted, theirs_are), (text, found, ours_are) = told
        assert (text, ours_are) == (said, theirs_are), here
        torch.testing.assert_close(found, wanted, rtol=AT_ONCE, atol=AT_ONCE * float(wanted.abs().max()))
    assert surgery.load(AutoModelForCausalLM.from_pretrained("base"), "out").active_adapters() == ["default"]


@pytest.mark.parametrize("name", ["get_peft_model", "PeftModel", "PeftConfig"])
def test_a_name_of_peft_is_told_what_it_is_here(name: str) -> None:
    with pytest.raises(AttributeError, match=r"what peft has so is here surgery\."):
        getattr(surgery, name)


def test_a_merge_of_named_adapters_that_is_refused_leaves_those_that_ran() -> None:
    torch.manual_seed(0)
    model: Any = surgery.inject(LlamaForCausalLM(LlamaConfig(**SMALL)), surgery.LoraConfig(target_modules=["q_proj"]))
    model.add_adapter(surgery.LoraConfig(target_modules=["q_proj"]), "b")
    model.get_submodule("model.layers.0.self_attn.q_proj").lora_B["b"].weight.data.fill_(float("nan"))
    model.set_adapter("default")
    with pytest.raises(surgery.ValueRangeError):
        model.merge_and_unload(adapter_names=["b"])
    assert model.active_adapters() == ["default"]
    assert type(model.merge_and_unload()) is LlamaForCausalLM


def test_a_quantized_weight_counts_as_many_numbers_as_it_has_decoded() -> None:
    pytest.importorskip("bitsandbytes")
    torch.manual_seed(0)
    plain, held = (LlamaForCausalLM(LlamaConfig(**SMALL)) for _ in range(2))
    surgery.quantize(held, "nf4")
    counts = [
        surgery.inject(model, surgery.LoraConfig(r=2, target_modules=["q_proj"])).get_nb_trainable_parameters()
        for model in (plain, held)
    ]
    assert counts[0] == counts[1] == (2 * 2 * 2 * 32, sum(one.numel() for one in plain.parameters()))
