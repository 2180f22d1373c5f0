"""OFT in a ball: a step of training begins within it, in the parameter itself; nothing else writes there."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import surgery

CONFIG = surgery.OFTConfig(oft_block_size=4, coft=True, eps=0.05, target_modules=["0", "2"])


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 12), nn.GELU(), nn.Linear(12, 8))


def beyond() -> Any:
    """A model with an adapter whose numbers lie beyond its ball."""
    model: Any = surgery.inject(net(), CONFIG)
    with torch.no_grad():
        for values in numbers(model):
            values.normal_()
    return model


def numbers(model: nn.Module) -> list[nn.Parameter]:
    return [values for name, values in model.named_parameters() if "oft_R" in name]


def state(model: nn.Module) -> list[Tensor]:
    return [values.detach().clone() for values in numbers(model)]


def same(found: list[Tensor], wanted: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


def step(model: nn.Module, optimizer: torch.optim.Optimizer, seed: int) -> None:
    torch.manual_seed(seed)
    optimizer.zero_grad()
    model(torch.randn(4, 16)).square().sum().backward()
    optimizer.step()


def adam(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.Adam([values for values in model.parameters() if values.requires_grad], lr=1e-2)


def test_a_step_begins_within_the_ball_in_the_parameter_itself() -> None:
    model = beyond().train()
    before = state(model)
    model(torch.randn(4, 16)).sum().backward()
    assert not same(state(model), before)
    # The skew Q of a block's numbers holds each twice; three roundings of a norm of 12 squares, and of the scaling.
    most = [0.05 / len(values) ** 0.5 * (1 + 16 * 2**-23) for values in numbers(model)]
    assert all(
        bool((2**0.5 * values.norm(dim=1) <= one).all()) for values, one in zip(numbers(model), most, strict=True)
    )


@pytest.mark.parametrize("how", ["evaluating", "frozen", "without gradients"])
def test_what_is_not_trained_is_not_written(how: str) -> None:
    model = beyond().train(how != "evaluating")
    for values in numbers(model):
        values.requires_grad_(how != "frozen")
    before, x = state(model), torch.randn(4, 16)
    with torch.set_grad_enabled(how != "without gradients"):
        found = model(x)
    assert same(state(model), before)
    assert torch.equal(found, beyond().train()(x))


def test_a_copy_is_trained_alone_and_a_run_that_is_taken_up_again_goes_on_to_the_bit(tmp_path: Path) -> None:
    model = beyond().train()
    optimizer = adam(model)
    for seed in range(2):
        step(model, optimizer, seed)
    surgery.save(model, tmp_path)
    kept, before, twin = copy.deepcopy(optimizer.state_dict()), state(model), copy.deepcopy(model)
    for seed in range(2, 4):
        step(model, optimizer, seed)
    assert same(state(twin), before)
    again: Any = surgery.load(net(), tmp_path, trainable=True).train()
    assert same(state(again), before)
    optimizer = adam(again)
    optimizer.load_state_dict(kept)
    again.eval()(torch.randn(4, 16))  # as an evaluation between does
    again.train()
    for seed in range(2, 4):
        step(again, optimizer, seed)
    assert same(state(again), state(model))


def test_what_is_saved_and_merged_after_a_step_is_what_the_model_runs_as(tmp_path: Path) -> None:
    model = beyond().train()
    step(model, adam(model), 0)
    surgery.save(model.eval(), tmp_path)
    x = torch.randn(4, 16)
    wanted = model(x)
    assert torch.equal(surgery.load(net(), tmp_path).eval()(x), wanted)
    merged = surgery.eject(surgery.merge(model), keep_merged=True)(x)
    # Sums of 16 products and of 12, of which each weight is rounded in its own place.
    room = 4 * (16 + 12) * torch.finfo(torch.float32).eps * wanted.abs().max()
    assert bool(((merged - wanted).abs() <= room).all())


def test_parameters_that_are_swapped_in_place_run_as_those_that_were_loaded() -> None:
    model, other = beyond().train(), beyond().train()
    with torch.no_grad():
        for values, new in zip(numbers(model), numbers(other), strict=True):
            new.mul_(3).add_(1)
            values.copy_(new)
    held = [id(values) for values in numbers(model)]
    x = torch.randn(4, 16)
    assert torch.equal(model(x), other(x))
    assert [id(values) for values in numbers(model)] == held
