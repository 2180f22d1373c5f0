"""The methods beside transformers' own with peft: the same states, files both ways, neither disturbed."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from adapted_llama import FIRST, SECOND, adapted, llama, outputs, state, trained, unchanged
from transformers import LlamaForCausalLM

import surgery


@pytest.fixture
def pair() -> tuple[Any, Any]:
    """Of one base, a model of surgery and one of transformers and peft, both under the same first adapter."""
    peft = pytest.importorskip("peft")
    theirs = llama()
    theirs.add_adapter(peft.LoraConfig(**FIRST), "first")
    theirs.add_adapter(peft.LoraConfig(**SECOND), "second")
    ours = adapted()
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs


STEPS: dict[str, Callable[[Any], object]] = {
    "first": lambda model: model.set_adapter("first"),
    "second": lambda model: model.set_adapter("second"),
    "both": lambda model: model.set_adapter(["first", "second"]),
    "disabled": lambda model: (model.set_adapter("first"), model.disable_adapters()),
    "enabled": lambda model: (model.set_adapter("second"), model.disable_adapters(), model.enable_adapters()),
}


@pytest.mark.parametrize("step", STEPS)
def test_a_method_does_what_it_does_in_transformers_with_peft(step: str, pair: tuple[Any, Any]) -> None:
    ours, theirs = pair
    for model in pair:
        STEPS[step](model)
    assert torch.equal(outputs(ours), outputs(theirs))
    assert ours.active_adapters() == theirs.active_adapters()
    if step != "disabled":  # peft freezes then, so that a pass without adapters cannot be part of a training step
        assert trained(ours) == trained(theirs)
    found, wanted = ours.get_adapter_state_dict(), theirs.get_adapter_state_dict()
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], values) for name, values in wanted.items())


def test_what_is_saved_on_one_side_is_loaded_on_the_other(pair: tuple[Any, Any], tmp_path: Path) -> None:
    ours, theirs = pair
    for model, folder in ((ours, "ours"), (theirs, "theirs")):
        model.set_adapter("second")
        model.save_pretrained(tmp_path / folder)
    by_them, by_us = llama(), surgery.load(llama(), tmp_path / "theirs")
    by_them.load_adapter(tmp_path / "ours")
    assert torch.equal(outputs(by_them), outputs(ours))
    assert torch.equal(outputs(by_us), outputs(ours))


def test_a_model_of_peft_beside_it_is_not_disturbed(pair: tuple[Any, Any], tmp_path: Path) -> None:
    ours, theirs = pair
    STEPS["first"](theirs)
    before, held = outputs(theirs), state(theirs)
    ours.set_adapter("second")
    ours.merge_adapter()
    ours.save_merged(tmp_path / "out")
    surgery.eject(ours)
    assert type(theirs) is LlamaForCausalLM
    assert unchanged(theirs, held)
    assert torch.equal(outputs(theirs), before)
    assert theirs.active_adapters() == ["first"]
    model = adapted()
    running = outputs(model)
    theirs.disable_adapters()
    theirs.delete_adapter(["first", "second"])
    assert torch.equal(outputs(model), running)
    assert model.active_adapters() == ["first"]
