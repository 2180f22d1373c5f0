"""transformers' Trainer trains, saves and resumes AdaLoRA."""

import inspect
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_trainer import Resuming, adapter, equal, llama, losses, trainer
from torch import Tensor
from transformers import LlamaForCausalLM, Trainer

import surgery
from surgery.procedures.live.adalora_progress import read_reduced

FIELDS: dict[str, Any] = {
    "init_r": 4,
    "target_r": 2,
    "tinit": 0,
    "tfinal": 2,
    "target_modules": ["q_proj", "down_proj"],
}
STEPS = 8


def injected(**options: Any) -> LlamaForCausalLM:
    return surgery.inject(llama(), surgery.AdaLoraConfig(**(FIELDS | {"total_step": STEPS} | options)))


def run(model: LlamaForCausalLM, folder: Path, kind: type[Trainer] = Resuming, **options: Any) -> Trainer:
    return trainer(model, folder, kind, **({"max_steps": STEPS, "learning_rate": 0.02} | options))


class OwnLoss(Trainer):
    """Its loss is made of what the model gives, though the model has the labels."""

    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **rest: Any) -> Any:  # noqa: ARG002
        outputs = model(**inputs)
        loss = outputs.logits.square().mean()
        return (loss, outputs) if return_outputs else loss


class OwnRegularizer(Trainer):
    """Adds the regularizer itself, as in a plain loop."""

    def compute_loss(self, model: Any, inputs: Any, *given: Any, **named: Any) -> Any:
        return super().compute_loss(model, inputs, *given, **named) + surgery.orthogonal_loss(model)


class OwnRegularizerFirst(Trainer):
    """The same, before the model is called."""

    def compute_loss(self, model: Any, inputs: Any, *given: Any, **named: Any) -> Any:
        mine = surgery.orthogonal_loss(model)
        return mine + super().compute_loss(model, inputs, *given, **named)


class OwnLossResuming(surgery.AdapterTrainer, OwnLoss):
    """The same with the mixin."""


class OwnRegularizerResuming(surgery.AdapterTrainer, OwnRegularizer):
    """The same with the mixin."""


class OwnRegularizerFirstResuming(surgery.AdapterTrainer, OwnRegularizerFirst):
    """The same with the mixin."""


class Doubling(surgery.AdapterTrainer, Trainer):
    """Adds the regularizer to a loss that has it."""

    def compute_loss(self, model: Any, inputs: Any, *given: Any, **named: Any) -> Any:
        return super().compute_loss(model, inputs, *given, **named) + surgery.orthogonal_loss(model)


def left(model: LlamaForCausalLM) -> int:
    return sum(int((values != 0).sum()) for name, values in model.named_parameters() if "lora_E" in name)


def state(model: LlamaForCausalLM) -> dict[str, Tensor]:
    return {name: values.clone() for name, values in model.state_dict().items() if "lora_" in name}


@pytest.mark.parametrize("options", [{}, {"torch_compile": True, "torch_compile_backend": "eager"}], ids=str)
def test_ranks_fall_in_a_run_as_in_a_loop_of_ones_own(options: dict[str, Any], tmp_path: Path) -> None:
    model = injected()
    assert left(model) == 0
    run(model, tmp_path, **options).train()
    assert left(model) == 8
    assert model.peft_config["default"].rank_pattern is not None
    again = surgery.load(llama(), tmp_path / f"checkpoint-{STEPS}")
    assert equal(adapter(again), adapter(model))


@pytest.mark.parametrize("cut", [1, 4, 7])
@pytest.mark.parametrize("options", [{}, {"deltaT": 3, "lora_dropout": 0.1}], ids=str)
def test_a_resumed_run_is_the_uninterrupted_one_to_the_last_bit(
    cut: int, options: dict[str, Any], tmp_path: Path
) -> None:
    whole, model = injected(**options), injected(**options)
    uninterrupted, resumed = run(whole, tmp_path / "whole"), run(model, tmp_path / "resumed")
    uninterrupted.train()
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / f"checkpoint-{cut}"))
    assert len(set(losses(uninterrupted).values())) == STEPS
    assert losses(resumed) == losses(uninterrupted)
    assert equal(state(model), state(whole))
    assert model.peft_config["default"].rank_pattern == whole.peft_config["default"].rank_pattern


def test_the_callback_serves_the_stock_trainer_and_a_checkpoint_of_it_cannot_be_resumed(tmp_path: Path) -> None:
    model, ours = injected(), injected()
    stock = run(model, tmp_path / "stock", Trainer)
    stock.add_callback(surgery.AdaLoraCallback())
    stock.train()
    run(ours, tmp_path / "ours").train()
    assert equal(state(model), state(ours))
    with pytest.raises(surgery.InputError, match="it holds no surgery"):
        run(injected(), tmp_path / "again").train(resume_from_checkpoint=str(tmp_path / "stock" / "checkpoint-3"))


@pytest.mark.parametrize("only_model", [False, True])
def test_the_best_model_is_loaded_at_the_end(only_model: bool, tmp_path: Path) -> None:
    model = injected()
    best = run(
        model,
        tmp_path,
        learning_rate=0.5,
        greater_is_better=True,  # so that the last is not the best
        eval_strategy="steps",
        eval_steps=1,
        load_best_model_at_end=True,
        save_only_model=only_model,
    )
    best.train()
    scores = [line["eval_loss"] for line in best.state.log_history if "eval_loss" in line]
    assert max(scores) > scores[-1]
    assert best.evaluate()["eval_loss"] == pytest.approx(max(scores), rel=64 * torch.finfo(torch.float32).eps)


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (Resuming, {}),
        (Resuming, {"label_smoothing_factor": 0.1}),
        (Resuming, {"gradient_accumulation_steps": 2}),
        (Resuming, {"gradient_accumulation_steps": 2, "label_smoothing_factor": 0.1}),
        (OwnLossResuming, {}),
        (OwnLossResuming, {"gradient_accumulation_steps": 2}),
        (OwnRegularizerResuming, {}),
        (OwnRegularizerFirstResuming, {}),
    ],
    ids=str,
)
def test_the_regularizer_counts_once_a_step_whatever_the_loss_is_made_of(
    kind: type[Trainer], options: dict[str, Any], tmp_path: Path
) -> None:
    model, alone = injected(), injected(orth_reg_weight=0)
    regularizer = surgery.orthogonal_loss(model).item()
    assert regularizer > 0.1
    first = []
    for one, name in ((model, "with"), (alone, "without")):
        again = run(one, tmp_path / name, kind, **options)
        again.train()
        first.append(losses(again)[1])
    eps = torch.finfo(torch.float32).eps
    assert first[0] - first[1] == pytest.approx(regularizer, abs=8 * eps * first[0])  # 4 sums, and what is logged


@pytest.mark.parametrize("options", [{}, {"label_smoothing_factor": 0.1}], ids=str)
def test_the_regularizer_is_not_added_twice(options: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(surgery.UsageError, match="the last loss holds it"):
        run(injected(), tmp_path, Doubling, **options).train()


def test_what_is_evaluated_before_training_has_no_regularizer(tmp_path: Path) -> None:
    model = injected()
    alone, ours = run(model, tmp_path, Trainer), run(model, tmp_path, Resuming)
    assert ours.evaluate()["eval_loss"] == alone.evaluate()["eval_loss"]


def test_a_live_merge_of_ranks_that_have_fallen_has_the_bits_of_one_of_its_files(tmp_path: Path) -> None:
    llama().save_pretrained(tmp_path / "base")
    model = injected(init_r=8)
    run(model, tmp_path / "run", learning_rate=0.3).train()
    model.save_pretrained(tmp_path / "adapter")
    model.save_merged(tmp_path / "live")
    surgery.merge_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "streamed")
    live, streamed = (load_file(tmp_path / where / "model.safetensors") for where in ("live", "streamed"))
    assert [name for name in live if not torch.equal(live[name], streamed[name])] == []


def test_lora_beside_adalora_is_trained_and_resumed_too(tmp_path: Path) -> None:
    def both() -> LlamaForCausalLM:
        model = injected()
        model.add_adapter(surgery.LoraConfig(r=2, target_modules=["q_proj"]), "second")
        model.set_adapter(["default", "second"])
        return model

    whole, model = both(), both()
    uninterrupted, resumed = run(whole, tmp_path / "whole"), run(model, tmp_path / "resumed")
    uninterrupted.train()
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))
    assert losses(resumed) == losses(uninterrupted)
    assert equal(state(model), state(whole))


@pytest.mark.parametrize("kind", [Resuming, Trainer])
def test_a_training_that_ends_before_the_ranks_have_fallen_is_refused(kind: type[Trainer], tmp_path: Path) -> None:
    end = STEPS - FIELDS["tfinal"]
    short, model = run(injected(), tmp_path / "short", kind, max_steps=end - 1), injected()
    enough = run(model, tmp_path / "enough", kind, max_steps=end)
    if kind is Trainer:
        for one in (short, enough):
            one.add_callback(surgery.AdaLoraCallback())
    with pytest.raises(surgery.UsageError, match=f"until step {end}, .* has {end - 1} steps; .* total_step={end - 1}"):
        short.train()
    enough.train()
    assert left(model) < sum(values.numel() for name, values in model.named_parameters() if "lora_E" in name)


@pytest.mark.parametrize("lacking", ["A", "E.uncertainty"])
@pytest.mark.parametrize("shape", [None, (1, 1, 1)], ids=["absent", "another shape"])
def test_a_checkpoint_with_half_of_its_progress_changes_nothing(
    lacking: str, shape: tuple[int, ...] | None, tmp_path: Path
) -> None:
    run(injected(), tmp_path).train()
    file = tmp_path / "checkpoint-3" / "surgery.adalora"
    held = load_file(file)
    name = next(reversed([key for key in held if key.endswith(f"down_proj.{lacking}")]))
    del held[name]
    save_file(held if shape is None else held | {name: torch.zeros(shape)}, file)
    model = injected()
    before, config = state(model), model.peft_config["default"]
    with pytest.raises(surgery.InputError, match=rf"surgery.adalora: .*{name}.* is wanted"):
        run(model, tmp_path / "again").train(resume_from_checkpoint=str(file.parent))
    assert equal(state(model), before)
    assert model.peft_config["default"] == config


def test_a_best_checkpoint_that_holds_another_kind_of_adapter_changes_nothing(tmp_path: Path) -> None:
    surgery.save(surgery.inject(llama(), surgery.LoraConfig(r=4, target_modules=FIELDS["target_modules"])), tmp_path)
    model = injected()
    before, config = state(model), model.peft_config["default"]
    with pytest.raises(surgery.MatchError, match="its adapter is of LORA, and the model's of ADALORA"):
        read_reduced(model, "default", tmp_path)
    assert equal(state(model), before)
    assert model.peft_config["default"] == config


def test_labels_given_by_their_place_count_too() -> None:
    model, tokens = injected(), torch.arange(12).view(2, 6)
    place = list(inspect.signature(model.forward).parameters).index("labels")
    by_name = model(input_ids=tokens, labels=tokens, return_dict=False)[0]
    by_place = model(tokens, *[None] * (place - 1), tokens, return_dict=False)[0]
    assert torch.equal(by_place, by_name)
    surgery.disable_adapters(model)
    assert model(input_ids=tokens, labels=tokens).loss < by_name
