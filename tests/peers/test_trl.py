"""AdapterTrainer before TRL's SFTTrainer: trains the adapter alone, and resumes to the last bit."""

from pathlib import Path
from typing import Any

import datasets
import torch
import trl
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import surgery

WORDS = ["<pad>", "<eos>", *(f"w{index}" for index in range(40))]
SMALL = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
TEXTS = [" ".join(WORDS[2 + row * place % 40] for place in range(1, 9)) for row in range(16)]


def injected() -> LlamaForCausalLM:
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SMALL, vocab_size=len(WORDS)))
    return surgery.inject(model, surgery.LoraConfig(r=4, target_modules=["q_proj", "down_proj"]))


def tokenizer() -> PreTrainedTokenizerFast:
    words = Tokenizer(models.WordLevel({word: index for index, word in enumerate(WORDS)}, unk_token="<pad>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<eos>")


def trainer(model: LlamaForCausalLM, folder: Path) -> Any:
    kind = type("Sft", (surgery.AdapterTrainer, trl.SFTTrainer), {})
    quiet = {"use_cpu": True, "report_to": [], "disable_tqdm": True, "bf16": False}
    settings = {"max_steps": 4, "save_steps": 2, "per_device_train_batch_size": 2, "learning_rate": 0.01}
    arguments = trl.SFTConfig(str(folder), **quiet, **settings, max_length=16)
    data = datasets.Dataset.from_list([{"text": text} for text in TEXTS])
    return kind(model=model, args=arguments, train_dataset=data, processing_class=tokenizer())


def test_a_run_changes_the_adapter_alone_and_is_resumed_to_the_last_bit(tmp_path: Path) -> None:
    model, again = injected(), injected()
    before = {name: values.clone() for name, values in model.state_dict().items()}
    trainer(model, tmp_path / "whole").train()
    after = model.state_dict()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {name for name, values in model.named_parameters() if values.requires_grad}
    weights = {path.name for path in (tmp_path / "whole" / "checkpoint-2").glob("*.safetensors")}
    assert weights == {"adapter_model.safetensors"}
    trainer(again, tmp_path / "resumed").train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    assert all(torch.equal(values, after[name]) for name, values in again.state_dict().items())
