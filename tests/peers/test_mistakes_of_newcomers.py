"""What is easily done wrong with a model of transformers: refused with the next step, or served."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM, Trainer
from transformers import TrainingArguments as Arguments

import surgery

SMALL = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4, "vocab_size": 99}
CONFIG = surgery.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
ROWS = [{"input_ids": row, "labels": row} for row in torch.arange(16).reshape(4, 4)]


class AdapterTrainer(surgery.AdapterTrainer, Trainer):
    pass


def llama() -> Any:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SMALL))


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    llama().save_pretrained(tmp_path / "base")
    surgery.save(surgery.inject(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), CONFIG), tmp_path / "adapter")
    return tmp_path / "adapter"


OF_PEFT: dict[str, Callable[[Any, Path], object]] = {
    "inject": lambda model, _: surgery.inject(model, CONFIG, adapter_name="b"),
    "load": lambda model, folder: surgery.load(model, folder, adapter_name="b"),
    "save": lambda model, folder: surgery.save(model, folder / "again"),
    "merge": lambda model, _: surgery.merge(model),
    "set": lambda model, _: surgery.set_adapter(model, "default"),
}


@pytest.mark.parametrize("call", OF_PEFT)
@pytest.mark.parametrize("wrapped", [True, False], ids=["PeftModel", "of transformers"])
def test_a_model_with_adapters_of_peft_is_told_so(call: str, wrapped: bool, saved: Path) -> None:
    peft = pytest.importorskip("peft")
    model, config = llama(), peft.LoraConfig(r=2, target_modules=["q_proj"])
    if wrapped:
        model = peft.get_peft_model(model, config)
    else:
        model.add_adapter(config, "default")
    with pytest.raises(surgery.StateError, match="the model has adapters of peft"):
        OF_PEFT[call](model, saved)


def test_a_model_that_peft_has_left_is_as_any_other(saved: Path) -> None:
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(llama(), peft.LoraConfig(r=2, target_modules=["q_proj"])).unload()
    assert surgery.load(model, saved).active_adapters() == ["default"]


UNTRAINED: dict[str, tuple[Callable[[Any], object], str]] = {
    "merged": (surgery.merge, "unmerge first"),
    "disabled": (lambda model: model.disable_adapters(), "enable_adapters first"),
    "loaded to be used": (lambda model: model.requires_grad_(False), "trainable=True"),
}


@pytest.mark.parametrize("state", UNTRAINED)
def test_a_training_of_nothing_is_refused_before_it_begins(state: str, tmp_path: Path) -> None:
    model, (bring, told) = surgery.inject(llama(), CONFIG), UNTRAINED[state]
    bring(model)
    arguments = Arguments(str(tmp_path), max_steps=1, report_to=[], use_cpu=True, disable_tqdm=True)
    with pytest.raises(surgery.StateError, match=told):
        AdapterTrainer(model=model, args=arguments, train_dataset=ROWS).train()


def test_a_config_of_transformers_says_how_a_model_is_quantized(saved: Path) -> None:
    bitsandbytes = pytest.importorskip("bitsandbytes")
    double = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype="bfloat16"
    )
    held = surgery.load_model(saved, quantization=double).model.layers[0].mlp.up_proj
    assert isinstance(held, bitsandbytes.nn.Linear4bit)
    assert (held.weight.quant_state.nested, held.compute_dtype) == (True, torch.bfloat16)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"model_class": "LlamaForCausalLM"}, "the class itself is wanted"),
        ({"quantization": 4}, "BitsAndBytesConfig"),
        ({"quantization": "4bit"}, "nf4, fp4, int8"),
    ],
)
def test_an_option_of_load_model_that_is_none_is_told_what_is_wanted(
    options: dict[str, Any], told: str, saved: Path
) -> None:
    with pytest.raises(surgery.UsageError, match=told):
        surgery.load_model(saved, **options)


def test_named_adapters_are_merged_as_in_peft() -> None:
    model = surgery.inject(llama(), CONFIG)
    model.add_adapter(CONFIG, "b")
    tokens = torch.arange(8)[None]
    both = {name: (model.set_adapter(name), model.eval()(tokens).logits)[1] for name in ("default", "b")}
    model.merge_adapter(["default"], safe_merge=True)
    assert not torch.allclose(model(tokens).logits, both["b"])
    model.unmerge_adapter()
    assert torch.equal(model(tokens).logits, both["default"])
