"""Copies of an adapted model of transformers: by deepcopy, pickle, torch.save and a state_dict."""

import copy
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from adapted_llama import adapted, outputs, state
from transformers import LlamaForCausalLM, PreTrainedModel

import surgery


def again_by_deepcopy(model: PreTrainedModel, folder: Path) -> PreTrainedModel:  # noqa: ARG001  # as the others
    return copy.deepcopy(model)


def again_by_pickle(model: PreTrainedModel, folder: Path) -> PreTrainedModel:  # noqa: ARG001  # as the others
    return pickle.loads(pickle.dumps(model))


def again_by_torch(model: PreTrainedModel, folder: Path) -> PreTrainedModel:
    torch.save(model, folder / "model.pt")
    return torch.load(folder / "model.pt", weights_only=False)


@pytest.mark.parametrize("again", [again_by_deepcopy, again_by_pickle, again_by_torch])
def test_a_copy_has_the_methods_and_is_switched_alone(
    again: Callable[[PreTrainedModel, Path], PreTrainedModel], tmp_path: Path
) -> None:
    model = adapted()
    before, twin = outputs(model), again(model, tmp_path)
    assert type(twin) is type(model)
    twin.set_adapter("second")
    assert not torch.equal(outputs(twin), before)
    assert model.active_adapters() == ["first"]
    assert torch.equal(outputs(model), before)
    twin.set_adapter("first")
    assert torch.equal(outputs(twin), before)
    surgery.eject(twin)
    assert type(twin) is LlamaForCausalLM
    assert type(model) is not LlamaForCausalLM


def test_a_state_dict_goes_round() -> None:
    model, other = adapted(), adapted()
    other.load_state_dict(state(model))
    assert torch.equal(outputs(other), outputs(model))
