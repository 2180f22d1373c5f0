"""AdapterTrainer before TRL's SFTTrainer: trains the adapter alone, and resumes to the last bit."""

from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
import trl
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import surgery

WORDS = ["<pad>", "<eos>", *(f"w{index}" for index in range(40))]
SMALL = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
TEXTS = [" ".join(WORDS[2 + row * place % 40] for place in range(1, 9)) for row in range(16)]


def injected(config: object = None) -> LlamaForCausalLM:
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SMALL, vocab_size=len(WORDS)))
    return surgery.inject(model, config or surgery.LoraConfig(r=4, target_modules=["q_proj", "down_proj"]))


def tokenizer() -> PreTrainedTokenizerFast:
    words = Tokenizer(models.WordLevel({word: index for index, word in enumerate(WORDS)}, unk_token="<pad>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<eos>")


def trainer(model: LlamaForCausalLM, folder: Path, **options: Any) -> Any:
    kind = type("Sft", (surgery.AdapterTrainer, trl.SFTTrainer), {})
    quiet: dict[str, Any] = {"use_cpu": True, "report_to": [], "disable_tqdm": True, "bf16": False}
    settings: dict[str, Any] = {
        "max_steps": 4,
        "save_steps": 2,
        "per_device_train_batch_size": 2,
        "learning_rate": 0.01,
    }
    settings |= {"logging_steps": 1}
    arguments = trl.SFTConfig(str(folder), **(quiet | settings | options), max_length=16)
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


@pytest.mark.parametrize("loss", ["chunked_nll", "nll", "dft"])
def test_the_regularizer_of_adalora_counts_in_every_loss(loss: str, tmp_path: Path) -> None:
    first, regularizer = [], 0.0
    for weight in (0.5, 0.0):
        fields = {"init_r": 4, "target_r": 2, "total_step": 4, "tfinal": 1, "target_modules": ["q_proj"]}
        model = injected(surgery.AdaLoraConfig(**fields, orth_reg_weight=weight))
        regularizer += surgery.orthogonal_loss(model).item()
        run = trainer(model, tmp_path / str(weight), loss_type=loss)
        run.train()
        first.append(next(line["loss"] for line in run.state.log_history if "loss" in line))
    assert regularizer > 0.1
    assert first[0] - first[1] == pytest.approx(regularizer, abs=4 * torch.finfo(torch.float32).eps * first[0])


def test_dpo_trains_the_adapter_against_the_model_that_it_is_given(tmp_path: Path) -> None:
    kind = type("Dpo", (surgery.AdapterTrainer, trl.DPOTrainer), {})
    quiet: dict[str, Any] = {"use_cpu": True, "report_to": [], "disable_tqdm": True, "bf16": False}
    settings: dict[str, Any] = {"max_steps": 4, "save_steps": 2, "per_device_train_batch_size": 2, "logging_steps": 1}
    rows = [{"prompt": "w1 w2", "chosen": f" w3 w{row}", "rejected": f" w5 w{row + 2}"} for row in range(16)]

    def run(model: LlamaForCausalLM, folder: str) -> Any:
        arguments = trl.DPOConfig(str(tmp_path / folder), **quiet, **settings, learning_rate=0.01)
        data = datasets.Dataset.from_list(rows)
        reference = injected()
        return kind(model=model, ref_model=reference, args=arguments, train_dataset=data, processing_class=tokenizer())

    model, again = injected(), injected()
    whole, resumed = run(model, "whole"), run(again, "resumed")
    whole.train()
    losses = [line["loss"] for line in whole.state.log_history if "loss" in line]
    assert losses[0] == torch.tensor(2.0).log().item()  # the two agree
    assert losses[-1] < losses[0]
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    after = model.state_dict()
    assert all(torch.equal(values, after[name]) for name, values in again.state_dict().items())


@pytest.mark.parametrize("options", [{"target_modules": ["lm_head"]}, {"modules_to_save": ["lm_head"]}], ids=str)
@pytest.mark.parametrize("tied", [False, True])
def test_an_adapted_head_is_trained_by_the_fused_loss_as_by_the_plain_one(
    options: dict[str, Any], tied: bool, tmp_path: Path
) -> None:
    trained = []
    for loss in ("chunked_nll", "nll"):
        torch.manual_seed(0)
        model = LlamaForCausalLM(LlamaConfig(**SMALL, vocab_size=len(WORDS), tie_word_embeddings=tied))
        surgery.inject(model, surgery.LoraConfig(**({"r": 4, "target_modules": ["q_proj"]} | options)))
        before = {name: values.clone() for name, values in model.named_parameters() if values.requires_grad}
        run = trainer(model, tmp_path / loss, loss_type=loss, max_steps=1, optim="sgd", max_grad_norm=0)
        run.train()
        trained.append({name: values - before[name] for name, values in model.named_parameters() if name in before})
    for name, values in trained[1].items():  # sums over 18 tokens and 42 words, in another order
        within = 18 * len(WORDS) * torch.finfo(torch.float32).eps * float(values.abs().max())
        torch.testing.assert_close(trained[0][name], values, rtol=0, atol=within)
    assert any("lm_head" in name and values.any() for name, values in trained[0].items())
