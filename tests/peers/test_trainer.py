"""transformers' Trainer trains, saves and resumes a model with adapters, with peft installed or not."""

from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

import surgery

SMALL = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 99}
CONFIG = {"r": 4, "target_modules": ["q_proj", "down_proj"], "lora_dropout": 0.1}
ROWS = [{"input_ids": row, "labels": row} for row in torch.arange(96).reshape(16, 6)]
STEPS, CUT = 6, 3  # the whole run, and the checkpoint that is resumed from

Row = dict[str, Tensor]


class Resuming(surgery.AdapterTrainer, Trainer):
    """Trainer with the mixin."""


class Weighted(Trainer):
    """Somebody's own Trainer."""

    def compute_loss(self, *given: Any, **named: Any) -> Any:
        found = super().compute_loss(*given, **named)
        return (2 * found[0], *found[1:]) if isinstance(found, tuple) else 2 * found


class WeightedResuming(surgery.AdapterTrainer, Weighted):
    """The same with the mixin."""


def llama(dtype: torch.dtype = torch.float32) -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SMALL)).to(dtype)


def injected(dtype: torch.dtype = torch.float32, **options: Any) -> LlamaForCausalLM:
    return surgery.inject(llama(dtype), surgery.LoraConfig(**(CONFIG | options)))


def trainer(model: LlamaForCausalLM, folder: Path, kind: type[Trainer] = Resuming, **options: Any) -> Trainer:
    settings: dict[str, Any] = {
        "max_steps": STEPS,
        "learning_rate": 0.01,
        "per_device_train_batch_size": 2,
        "logging_steps": 1,
        "save_steps": 1,
    }
    quiet: dict[str, Any] = {"use_cpu": True, "report_to": [], "disable_tqdm": True}
    arguments = TrainingArguments(str(folder), **(quiet | settings | options))
    return kind(model=model, args=arguments, train_dataset=ROWS, eval_dataset=ROWS[:4])


def losses(run: Trainer) -> dict[int, float]:
    return {line["step"]: line["loss"] for line in run.state.log_history if "loss" in line}


def adapter(model: LlamaForCausalLM) -> dict[str, Tensor]:
    return {name: values.clone() for name, values in model.get_adapter_state_dict().items()}


def equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"gradient_checkpointing": True},
        {"gradient_accumulation_steps": 2},
        {"bf16": True},
        {"eval_strategy": "steps", "eval_steps": 2},
        {"torch_compile": True, "torch_compile_backend": "eager"},
    ],
    ids=str,
)
def test_a_run_of_trainer_alone_changes_the_adapter_and_its_checkpoints_hold_nothing_else(
    options: dict[str, Any], tmp_path: Path
) -> None:
    model = injected()
    before = {name: values.clone() for name, values in model.state_dict().items()}
    trained = {name for name, values in model.named_parameters() if values.requires_grad}
    run = trainer(model, tmp_path, Trainer, **options)
    run.train()
    after = model.state_dict()
    assert {name for name in before if not torch.equal(before[name], after[name])} == trained
    assert trained == {name for name in before if ".default." in name}
    weights = {path.name for path in (tmp_path / f"checkpoint-{STEPS}").glob("*.safetensors")}
    assert weights == {"adapter_model.safetensors"}
    assert not {"config.json", "pytorch_model.bin"} & {path.name for path in tmp_path.rglob("*")}
    again = surgery.load(llama(), tmp_path / f"checkpoint-{STEPS}")
    assert equal(adapter(again), adapter(model))


@pytest.mark.parametrize("kind", [Resuming, WeightedResuming])
@pytest.mark.parametrize(
    ("dtype", "options", "run_options"),
    [
        (torch.float32, {}, {}),
        (torch.float32, {"modules_to_save": ["lm_head"]}, {}),
        (torch.float32, {"init_lora_weights": "pissa", "use_rslora": True}, {}),
        (torch.bfloat16, {}, {"bf16": True}),
        (torch.float32, {}, {"gradient_accumulation_steps": 2, "gradient_checkpointing": True}),
    ],
    ids=["plain", "head", "pissa", "bf16", "checkpointing"],
)
def test_a_resumed_run_is_the_uninterrupted_one_to_the_last_bit(
    kind: type[Trainer], dtype: torch.dtype, options: dict[str, Any], run_options: dict[str, Any], tmp_path: Path
) -> None:
    whole = injected(dtype, **options)
    uninterrupted = trainer(whole, tmp_path / "whole", kind, **run_options)
    uninterrupted.train()
    folder = tmp_path / "whole" / f"checkpoint-{CUT}"
    model = injected(dtype, **options)
    resumed = trainer(model, tmp_path / "resumed", kind, **run_options)
    resumed.train(resume_from_checkpoint=str(folder))
    wanted = losses(uninterrupted)
    assert len(set(wanted.values())) == STEPS
    assert losses(resumed) == wanted
    assert equal(adapter(model), adapter(whole))


def test_a_run_resumes_from_the_last_checkpoint_in_its_folder_and_keeps_no_more_than_told(tmp_path: Path) -> None:
    whole = injected()
    trainer(whole, tmp_path / "whole").train()
    trainer(injected(), tmp_path / "cut", max_steps=CUT, save_total_limit=2, lr_scheduler_type="constant").train()
    kept = {path.name for path in (tmp_path / "cut").iterdir()}
    assert kept == {f"checkpoint-{CUT - 1}", f"checkpoint-{CUT}"}
    model = injected()
    run = trainer(model, tmp_path / "cut", save_total_limit=2)
    run.train(resume_from_checkpoint=True)
    assert run.state.global_step == STEPS


def test_two_adapters_that_run_together_are_trained_and_resumed(tmp_path: Path) -> None:
    def both() -> LlamaForCausalLM:
        model = injected()
        model.add_adapter(surgery.LoraConfig(r=2, target_modules=["v_proj"]), "second")
        model.set_adapter(["default", "second"])
        return model

    whole, model = both(), both()
    uninterrupted, resumed = trainer(whole, tmp_path / "whole"), trainer(model, tmp_path / "resumed")
    uninterrupted.train()
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / f"checkpoint-{CUT}"))
    assert losses(resumed) == losses(uninterrupted)
    for name in ("default", "second"):
        assert torch.equal(*(one.get_adapter_state_dict(name).popitem()[1] for one in (whole, model)))


def test_the_best_model_is_loaded_at_the_end(tmp_path: Path) -> None:
    model = injected()
    run = trainer(
        model,
        tmp_path,
        learning_rate=1.0,  # so that the last is not the best
        lr_scheduler_type="constant",
        eval_strategy="steps",
        eval_steps=1,
        load_best_model_at_end=True,
    )
    run.train()
    scores = [line["eval_loss"] for line in run.state.log_history if "eval_loss" in line]
    assert min(scores) < scores[-1]
    assert run.evaluate()["eval_loss"] == min(scores)
    best = surgery.load(llama(), run.state.best_model_checkpoint)
    assert equal(adapter(best), adapter(model))


def test_a_checkpoint_of_another_config_is_refused_and_changes_nothing(tmp_path: Path) -> None:
    trainer(injected(), tmp_path / "first").train()
    model = injected(target_modules=["q_proj"])
    before = adapter(model)
    with pytest.raises(surgery.MatchError, match="unlike the model's adapter"):
        trainer(model, tmp_path / "second").train(resume_from_checkpoint=str(tmp_path / "first" / f"checkpoint-{CUT}"))
    assert equal(adapter(model), before)


def test_a_model_without_adapters_is_resumed_as_ever(tmp_path: Path) -> None:
    whole, model = llama(), llama()
    uninterrupted, resumed = trainer(whole, tmp_path / "whole"), trainer(model, tmp_path / "resumed")
    uninterrupted.train()
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / f"checkpoint-{CUT}"))
    assert losses(resumed) == losses(uninterrupted)


def test_trainer_alone_cannot_resume_without_peft(tmp_path: Path) -> None:
    """Why the mixin is needed; when this fails it may no longer be."""
    trainer(injected(), tmp_path / "first").train()
    with pytest.raises(ValueError, match="checkpoint index"):
        trainer(injected(), tmp_path / "second", Trainer).train(
            resume_from_checkpoint=str(tmp_path / "first" / f"checkpoint-{CUT}")
        )


def test_accelerate_trains_and_saves_the_adapter(tmp_path: Path) -> None:
    accelerator = Accelerator(cpu=True)
    model = injected()
    optimizer = torch.optim.AdamW([values for values in model.parameters() if values.requires_grad], lr=0.01)
    prepared, optimizer = accelerator.prepare(model, optimizer)
    loss = prepared(input_ids=ROWS[0]["input_ids"][None], labels=ROWS[0]["labels"][None]).loss
    accelerator.backward(loss)
    optimizer.step()
    accelerator.unwrap_model(prepared).save_pretrained(
        tmp_path / "adapter",
        is_main_process=accelerator.is_main_process,
        save_function=accelerator.save,
        state_dict=accelerator.get_state_dict(prepared),
    )
    assert equal(adapter(surgery.load(llama(), tmp_path / "adapter")), adapter(model))
    accelerator.save_state(tmp_path / "state")
    before = adapter(model)
    with torch.no_grad():
        for values in model.parameters():
            values.zero_()
    accelerator.load_state(tmp_path / "state")
    assert equal(adapter(model), before)


def test_a_model_of_peft_is_resumed_as_ever(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")

    def theirs() -> Any:
        return peft.get_peft_model(llama(), peft.LoraConfig(**CONFIG))

    uninterrupted, resumed = trainer(theirs(), tmp_path / "whole"), trainer(theirs(), tmp_path / "resumed")
    uninterrupted.train()
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / f"checkpoint-{CUT}"))
    assert losses(resumed) == losses(uninterrupted)


@pytest.mark.parametrize("base", [Trainer, Weighted])
def test_the_mixin_behind_a_trainer_would_go_unheard_and_is_refused(base: type[Trainer]) -> None:
    with pytest.raises(
        surgery.UsageError, match=r"Behind: Trainer stands before .* class Behind\(surgery.AdapterTrain"
    ):
        type("Behind", (base, surgery.AdapterTrainer), {})
