"""AdaLoRA in training: what is allotted when, what is saved, and what is refused."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

import surgery

FIELDS: dict[str, Any] = {
    "init_r": 4,
    "target_r": 2,
    "tinit": 1,
    "tfinal": 2,
    "total_step": 8,
    "target_modules": ["0", "2"],
}
X = torch.linspace(-1, 1, 48).view(8, 6)


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 5))


def injected(**options: Any) -> nn.Sequential:
    return surgery.inject(net(), surgery.AdaLoraConfig(**(FIELDS | options)))


def train(model: nn.Module, *steps: int) -> list[float]:
    optimizer = torch.optim.AdamW([values for values in model.parameters() if values.requires_grad], lr=0.05)
    found = []
    for step in steps:
        loss = model(X).square().mean() + surgery.orthogonal_loss(model)
        loss.backward()
        optimizer.step()
        surgery.adalora_step(model, step)
        optimizer.zero_grad()
        found.append(float(loss.detach()))
    return found


def left(model: nn.Module) -> int:
    return sum(int((values != 0).sum()) for name, values in model.named_parameters() if "lora_E" in name)


def test_a_plain_model_is_trained_and_its_ranks_fall_to_the_target() -> None:
    model = injected()
    losses = train(model, 0, 1)
    assert left(model) == 8
    losses += train(model, *range(2, 10))
    assert left(model) == 4
    assert losses[-1] < losses[0]


def test_what_is_saved_is_the_model_also_where_a_triplet_has_grown_again(tmp_path: Path) -> None:
    model = injected(deltaT=3)
    train(model, *range(5))  # ranks are allotted at step 3, and at 4 they have grown again
    assert left(model) == 8
    surgery.save(model, tmp_path)
    assert torch.equal(surgery.load(net(), tmp_path)(X), model(X))
    train(model, 5, 6, 7)
    surgery.save(model, tmp_path / "after")
    again = surgery.load(net(), tmp_path / "after")
    assert sum(len(values) for name, values in again.named_parameters() if "lora_E" in name) == left(model) == 4
    assert torch.allclose(again(X), model(X), rtol=0, atol=64 * torch.finfo(torch.float32).eps)
    surgery.save(again, tmp_path / "again")
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "again" / file).read_bytes() == (tmp_path / "after" / file).read_bytes()


def test_the_last_allotting_is_made_up_for_where_its_step_was_left_out() -> None:
    whole, skipping = injected(), injected()
    train(whole, *range(7))
    train(skipping, *range(6), 7)
    assert left(whole) == left(skipping) == 4


def test_a_copy_goes_on_as_the_model_itself() -> None:
    model = injected()
    train(model, *range(4))
    twin = copy.deepcopy(model)
    assert train(twin, *range(4, 9)) == train(model, *range(4, 9))


def test_an_adapter_whose_ranks_are_allotted_is_trained_on_without_a_step(tmp_path: Path) -> None:
    model = injected()
    train(model, *range(8))
    surgery.save(model, tmp_path)
    again = surgery.load(net(), tmp_path, trainable=True)
    with pytest.raises(surgery.StateError, match="train this adapter without adalora_step"):
        train(again, 8)


def test_two_adapters_are_allotted_each_by_its_own_schedule() -> None:
    model = injected()
    surgery.inject(model, surgery.AdaLoraConfig(**(FIELDS | {"target_r": 1})), adapter_name="b")
    surgery.set_adapter(model, ["default", "b"])
    train(model, *range(8))
    parts = dict.fromkeys(("default", "b"), 0)
    for name, values in model.named_parameters():
        if "lora_E" in name:
            parts[name.rpartition(".")[2]] += int((values != 0).sum())
    assert parts == {"default": 4, "b": 2}


def test_the_regularizer_is_the_mean_over_all_vectors_times_its_weight() -> None:
    model = injected(orth_reg_weight=0.25)
    terms = []
    for name, values in model.named_parameters():
        if "lora_A" in name or "lora_B" in name:
            rows = (values if "lora_A" in name else values.T).double()
            terms.append((rows @ rows.T - torch.eye(4)).square().sum().sqrt())
    wanted = 0.25 * float(torch.stack(terms).mean())
    assert float(surgery.orthogonal_loss(model)) == pytest.approx(wanted, rel=64 * torch.finfo(torch.float32).eps)


def llama(**options: Any) -> Any:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=32))
    return surgery.inject(model, surgery.AdaLoraConfig(**(FIELDS | {"target_modules": ["q_proj"]} | options)))


def test_a_model_of_transformers_adds_the_regularizer_to_its_own_loss_and_only_once() -> None:
    model, tokens = llama(), torch.arange(8)[None]
    with torch.no_grad():
        task = model(input_ids=tokens, labels=tokens).loss
    regularizer = surgery.orthogonal_loss(model).detach()
    for output in (
        model(input_ids=tokens, labels=tokens).loss,
        model(input_ids=tokens, labels=tokens, return_dict=False)[0],
    ):
        assert torch.equal(output.detach(), task + regularizer)
        with pytest.raises(surgery.UsageError, match="the last loss holds it"):
            surgery.orthogonal_loss(model)
    assert torch.equal(model(input_ids=tokens).logits, model(input_ids=tokens, return_dict=False)[0])
    assert isinstance(surgery.orthogonal_loss(model), Tensor)
    with surgery.disable_adapters(model):
        assert torch.equal(model(input_ids=tokens, labels=tokens).loss, task)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"total_step": None}, "total_step is not given"),
        ({"tinit": 6}, "tinit must be smaller"),
        ({"target_r": 5}, "above init_r"),
        ({"r": 4}, "give init_r instead"),
    ],
    ids=str,
)
def test_a_schedule_that_cannot_be_followed_is_refused_and_changes_nothing(
    options: dict[str, Any], message: str
) -> None:
    model = net()
    before = [id(module) for module in model.modules()]
    with pytest.raises(surgery.ConfigError, match=message):
        surgery.inject(model, surgery.AdaLoraConfig(**(FIELDS | options)))
    assert [id(module) for module in model.modules()] == before


@pytest.mark.parametrize(
    "options",
    [
        {"lora_alpha": 0},
        {"beta1": 1},
        {"deltaT": 0},
        {"init_r": 0},
        {"orth_reg_weight": -1},
        {"rank_pattern": {"0.lora_E": [True]}},
        {"rank_pattern": {"0.lora_E": [1, 0, 1, 0]}},
        {"rank_pattern": [True]},
    ],
    ids=str,
)
def test_a_value_that_cannot_be_is_refused_by_its_name(options: dict[str, Any]) -> None:
    with pytest.raises(surgery.ConfigError, match=next(iter(options))):
        surgery.AdaLoraConfig(**(FIELDS | options))


def test_a_step_out_of_place_is_refused() -> None:
    with pytest.raises(surgery.StateError, match="no gradients"):
        surgery.adalora_step(injected(), 0)
    with pytest.raises(surgery.StateError, match="call it from step 0 on"):
        train(injected(), 7)
    with pytest.raises(surgery.StateError, match="no AdaLoRA adapter"):
        surgery.adalora_step(surgery.inject(net(), surgery.LoraConfig(target_modules=["0"])), 0)
    with pytest.raises(surgery.StateError, match="merged"):
        surgery.adalora_step(surgery.merge(injected()), 0)
    model = injected()
    model(X).square().mean().backward()
    next(values for name, values in model.named_parameters() if "lora_A" in name).grad.fill_(float("nan"))
    surgery.adalora_step(model, 0)
    model(X).square().mean().backward()
    with pytest.raises(surgery.ValueRangeError, match="NaN or infinity"):
        surgery.adalora_step(model, 2)


def test_an_embedding_is_refused_by_its_name() -> None:
    model = nn.Sequential(nn.Embedding(9, 4))
    with pytest.raises(surgery.MatchError, match="0: its op is embedding; AdaLoRA acts on Linear"):
        surgery.inject(model, surgery.AdaLoraConfig(**(FIELDS | {"target_modules": ["0"]})))
