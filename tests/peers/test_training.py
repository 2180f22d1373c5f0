"""Models with adapters are trained by transformers.Trainer and by a plain loop, with peft's gradients to the bit."""

import copy
import math
from collections.abc import Callable
from pathlib import Path

import peft
import pytest
import torch
from torch import Tensor, nn
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Trainer,
    TrainingArguments,
)

import surgery

SMALL = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 99}
TARGETS = {"target_modules": ["q_proj", "down_proj"]}
TOKENS = torch.arange(24).reshape(2, 12)
STEPS = 2  # in the first a fresh lora_A has no gradient, for lora_B is zero

# The scaling is a power of two: there a product and a sum round as one operation.
CASES: dict[str, dict[str, object]] = {
    "plain": TARGETS,
    "dropout": TARGETS | {"lora_dropout": 0.5},
    "rslora": TARGETS | {"use_rslora": True},
    "embedding": {"target_modules": ["embed_tokens", "v_proj"]},
    "output_head": TARGETS | {"modules_to_save": ["lm_head"]},
}
DTYPES = (torch.float32, torch.bfloat16)


def llama(dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SMALL)).to(dtype)


def injected(**options: object) -> PreTrainedModel:
    model = llama()
    return surgery.inject(model, surgery.LoraConfig(r=4, **(TARGETS | options)))


def outputs(model: nn.Module) -> Tensor:
    training = model.training
    with torch.no_grad():
        found = model.eval()(TOKENS).logits
    model.train(training)
    return found


def loss(model: nn.Module) -> Tensor:
    return model(input_ids=TOKENS, labels=TOKENS).loss


def gradients(model: nn.Module) -> dict[str, Tensor]:
    torch.manual_seed(5)  # of the dropout
    model.zero_grad()
    loss(model.train()).backward()
    found = {name: values.grad.clone() for name, values in model.named_parameters() if values.grad is not None}
    return {name.removeprefix("base_model.model."): values for name, values in found.items()}


def all_equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def by_a_loop(model: PreTrainedModel, folder: Path) -> float:  # noqa: ARG001  # as by_trainer
    chosen = [values for values in model.parameters() if values.requires_grad]
    optimizer = torch.optim.AdamW(chosen, lr=0.01)
    for _ in range(STEPS):
        optimizer.zero_grad()
        value = loss(model.train())
        value.backward()
        optimizer.step()
    return value.item()


def by_trainer(model: PreTrainedModel, folder: Path, **options: object) -> float:
    settings = {"max_steps": STEPS, "learning_rate": 0.01, "per_device_train_batch_size": 2} | options
    arguments = TrainingArguments(
        str(folder), use_cpu=True, report_to=[], save_strategy="no", disable_tqdm=True, **settings
    )
    rows = [{"input_ids": row, "labels": row} for row in TOKENS] * STEPS
    return Trainer(model=model, args=arguments, train_dataset=rows).train().training_loss


def by_trainer_checkpointing(model: PreTrainedModel, folder: Path) -> float:
    return by_trainer(model, folder, gradient_checkpointing=True)


def by_trainer_accumulating(model: PreTrainedModel, folder: Path) -> float:
    return by_trainer(model, folder, per_device_train_batch_size=1, gradient_accumulation_steps=2)


Train = Callable[[PreTrainedModel, Path], float]
LOOPS = [by_a_loop, by_trainer, by_trainer_checkpointing, by_trainer_accumulating]


@pytest.mark.parametrize("train", LOOPS)
@pytest.mark.parametrize("options", [{}, {"modules_to_save": ["lm_head"]}, {"lora_dropout": 0.25}], ids=str)
def test_training_changes_every_adapter_tensor_and_nothing_else(
    train: Train, options: dict[str, object], tmp_path: Path
) -> None:
    model = injected(**options)
    before = {name: values.detach().clone() for name, values in model.state_dict().items()}
    adapter = {name for name, values in model.named_parameters() if values.requires_grad}
    assert adapter == {name for name in before if ".default" in name}
    assert math.isfinite(train(model, tmp_path))
    after = model.state_dict()
    assert {name for name in before if not torch.equal(after[name], before[name])} == adapter
    assert all(torch.isfinite(values).all() for values in after.values())
    assert {name for name, values in model.named_parameters() if values.requires_grad} == adapter


@pytest.mark.parametrize("train", [by_a_loop, by_trainer])
def test_training_lowers_the_loss_and_ejecting_gives_the_base_back(train: Train, tmp_path: Path) -> None:
    base, model = outputs(llama()), injected()
    assert torch.equal(outputs(model), base)
    first = loss(model).item()
    train(model, tmp_path)
    assert loss(model).item() < first
    assert torch.equal(outputs(surgery.eject(model)), base)
    assert all(values.requires_grad for values in model.parameters())


@pytest.mark.parametrize("train", LOOPS)
@pytest.mark.parametrize("head", [None, ["lm_head"]], ids=["adapter", "adapter and head"])
def test_what_was_trained_is_saved_and_loaded_into_a_fresh_model_to_the_bit(
    train: Train, head: list[str] | None, tmp_path: Path
) -> None:
    model = injected(modules_to_save=head)
    train(model, tmp_path / "run")
    surgery.save(model, tmp_path / "adapter")
    fresh = surgery.load(llama(), tmp_path / "adapter")
    assert torch.equal(outputs(fresh), outputs(model))
    assert not torch.equal(outputs(fresh), outputs(llama()))
    assert not any(values.requires_grad for values in fresh.parameters())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES)
def test_gradients_are_those_of_peft_to_the_bit(case: str, dtype: torch.dtype, tmp_path: Path) -> None:
    config = peft.LoraConfig(r=4, init_lora_weights=False, **CASES[case])
    theirs = peft.get_peft_model(llama(dtype), config)
    theirs.save_pretrained(tmp_path)
    ours = surgery.load(llama(dtype), tmp_path, trainable=True)
    wanted, found = gradients(theirs), gradients(ours)
    assert wanted.keys() == {name for name, values in ours.named_parameters() if values.requires_grad}
    assert all(values.any() for values in wanted.values())
    assert all_equal(found, wanted)


def test_gradients_are_those_of_peft_for_transposed_weights(tmp_path: Path) -> None:
    torch.manual_seed(0)
    base = GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=99))
    config = peft.LoraConfig(r=4, init_lora_weights=False, target_modules=["c_attn", "c_proj"], fan_in_fan_out=True)
    theirs = peft.get_peft_model(copy.deepcopy(base), config)
    theirs.save_pretrained(tmp_path)
    assert all_equal(gradients(surgery.load(base, tmp_path, trainable=True)), gradients(theirs))


@pytest.mark.parametrize("reentrant", [False, True], ids=["saved tensors", "reentrant"])
@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_gradient_checkpointing_changes_no_bit_of_a_gradient(reentrant: bool, dropout: float) -> None:
    model = injected(init_lora_weights=False, lora_dropout=dropout)
    wanted, runs = gradients(model), 0

    def counted(*_: object) -> None:
        nonlocal runs
        runs += 1

    model.get_submodule("model.layers.0.self_attn.q_proj").register_forward_hook(counted)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    model.enable_input_require_grads()  # a reentrant checkpoint needs an input that requires gradients
    assert all_equal(gradients(model), wanted)
    assert runs == 2  # forward, and again backward


def test_a_copy_is_trained_alone(tmp_path: Path) -> None:
    model = injected(modules_to_save=["lm_head"])
    before, twin = outputs(model), copy.deepcopy(model)
    assert torch.equal(outputs(twin), before)
    by_a_loop(twin, tmp_path)
    assert not torch.equal(outputs(twin), before)
    assert torch.equal(outputs(model), before)
    by_a_loop(model, tmp_path)
    assert torch.equal(outputs(model), outputs(twin))


def test_a_pickled_model_runs_trains_and_is_ejected_as_before(tmp_path: Path) -> None:
    model = injected(init_lora_weights=False, modules_to_save=["lm_head"])
    surgery.inject(model, surgery.LoraConfig(r=2, target_modules=["up_proj"]), adapter_name="other")
    torch.save(model, tmp_path / "model.pt")
    again = torch.load(tmp_path / "model.pt", weights_only=False)
    assert torch.equal(outputs(again), outputs(model))
    for one in (again, model):
        by_a_loop(one, tmp_path)
        surgery.set_adapter(one, ["default", "other"])
    assert torch.equal(outputs(again), outputs(model))
    surgery.unmerge(surgery.merge(again))
    assert torch.equal(outputs(again), outputs(model))
    assert torch.equal(outputs(surgery.eject(again)), outputs(llama()))


def test_a_pickled_merge_is_still_undone_to_the_bit(tmp_path: Path) -> None:
    model = surgery.merge(injected(init_lora_weights=False))
    torch.save(model, tmp_path / "model.pt")
    again = torch.load(tmp_path / "model.pt", weights_only=False)
    for one in (again, copy.deepcopy(model)):
        assert torch.equal(outputs(one), outputs(model))
        assert all_equal(surgery.eject(one).state_dict(), llama().state_dict())


@pytest.mark.parametrize("case", CASES)
def test_state_dict_keys_are_spelled_as_peft_spells_them(case: str) -> None:
    theirs = peft.get_peft_model(llama(), peft.LoraConfig(r=4, **CASES[case]))
    theirs.add_adapter("other", peft.LoraConfig(r=2, target_modules=["up_proj"]))
    ours = surgery.inject(llama(), surgery.LoraConfig(r=4, **CASES[case]))
    surgery.inject(ours, surgery.LoraConfig(r=2, target_modules=["up_proj"]), adapter_name="other")
    wanted = {name.removeprefix("base_model.model."): values.shape for name, values in theirs.state_dict().items()}
    assert {name: values.shape for name, values in ours.state_dict().items()} == wanted


@pytest.mark.parametrize("assign", [False, True], ids=["copied", "assigned"])
def test_a_state_dict_goes_from_peft_to_surgery_and_back(assign: bool, tmp_path: Path) -> None:
    config = peft.LoraConfig(r=4, init_lora_weights=False, modules_to_save=["lm_head"], **TARGETS)
    theirs, ours = peft.get_peft_model(llama(), config), injected(modules_to_save=["lm_head"])
    torch.save(theirs.base_model.model.state_dict(), tmp_path / "state.pt")
    ours.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True), assign=assign)
    assert torch.equal(outputs(ours), outputs(theirs))
    by_a_loop(ours, tmp_path)
    theirs.base_model.model.load_state_dict(ours.state_dict())
    assert torch.equal(outputs(ours), outputs(theirs))
