"""Bare holds what nn.Module's own __init__ gives, each module its own."""

import torch
from torch import nn

from surgery.layers.bare import Bare


def test_a_bare_module_begins_as_any_module_does() -> None:
    bare, plain = Bare(), nn.Module()
    assert bare.__dict__ == plain.__dict__
    kinds = [{name: type(value) for name, value in one.__dict__.items()} for one in (bare, plain)]
    assert kinds[0] == kinds[1]


def test_what_one_holds_another_does_not() -> None:
    one, other = Bare(), Bare()
    one.weight = nn.Parameter(torch.ones(2))
    one.register_forward_hook(lambda *_: None)
    one.inner = nn.Linear(2, 2)
    assert other.__dict__ == Bare().__dict__ == nn.Module().__dict__
    assert sorted(one.state_dict()) == ["inner.bias", "inner.weight", "weight"]
