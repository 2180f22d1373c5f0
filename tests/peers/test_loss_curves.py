"""From the same seed and the same start, Trainer sees the same losses over peft's adapter and over ours."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

import surgery

peft = pytest.importorskip("peft")

SMALL = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 99}
ROWS = [{"input_ids": row, "labels": row} for row in torch.arange(96).reshape(16, 6)]
STEPS = 8
CONFIGS: dict[str, dict[str, Any]] = {
    "LORA": {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj", "down_proj"]},
    "IA3": {"target_modules": ["k_proj", "down_proj"], "feedforward_modules": ["down_proj"]},
}


def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SMALL))


def losses(model: Any, folder: Path, **options: Any) -> list[float]:
    settings = {"max_steps": STEPS, "learning_rate": 0.02, "per_device_train_batch_size": 2, "logging_steps": 1}
    quiet = {"use_cpu": True, "report_to": [], "disable_tqdm": True, "save_strategy": "no"}
    run = Trainer(model=model, args=TrainingArguments(str(folder), **settings, **quiet, **options), train_dataset=ROWS)
    run.train()
    return [line["loss"] for line in run.state.log_history if "loss" in line]


@pytest.mark.parametrize("options", [{}, {"weight_decay": 0.1, "gradient_accumulation_steps": 2}], ids=str)
@pytest.mark.parametrize("kind", CONFIGS)
def test_losses_and_adapters_of_a_run_are_those_of_peft_to_the_bit(
    kind: str, options: dict[str, Any], tmp_path: Path
) -> None:
    config = {"peft_type": kind, "task_type": "CAUSAL_LM", **CONFIGS[kind]}
    theirs, ours = peft.get_peft_model(llama(), peft.get_peft_config(config)), surgery.inject(llama(), config)
    ours.load_state_dict(theirs.base_model.model.state_dict())
    wanted = losses(theirs, tmp_path / "theirs", **options)
    assert len(set(wanted)) == STEPS
    assert losses(ours, tmp_path / "ours", **options) == wanted
    after = theirs.base_model.model.state_dict()
    assert all(torch.equal(values, after[name]) for name, values in ours.state_dict().items())
