"""An adapted layer as its callers meet it: calls without an input, and what a model prints."""

from contextlib import ExitStack

import pytest
import torch
from torch import nn

import surgery


def net() -> nn.ModuleDict:
    torch.manual_seed(0)
    return nn.ModuleDict(
        {"q": nn.Linear(8, 4), "c": nn.Conv2d(3, 4, 3), "e": nn.Embedding(10, 8), "other": nn.Linear(3, 3)}
    )


def given(name: str) -> torch.Tensor:
    return {"q": torch.ones(2, 8), "c": torch.ones(2, 3, 5, 5), "e": torch.ones(2, 3, dtype=torch.long)}[name]


@pytest.mark.parametrize("name", ["q", "c", "e"])
@pytest.mark.parametrize("state", ["one", "two", "off", "merged", "mixed", "saved", "saved, mixed"])
def test_a_call_without_an_input_is_the_type_error_of_the_layer(name: str, state: str) -> None:
    model = net()
    with pytest.raises(TypeError, match="'input'"):
        model[name]()
    saved = "saved" in state
    config = surgery.LoraConfig(
        r=2, target_modules=["other" if saved else name], modules_to_save=[name] if saved else None
    )
    surgery.inject(model, config)
    if state == "two":
        surgery.inject(model, config, adapter_name="b")
        surgery.set_adapter(model, ["default", "b"])
    with ExitStack() as stack:
        if state == "off":
            stack.enter_context(surgery.disable_adapters(model))
        elif state == "merged":
            surgery.merge(model)
        elif "mixed" in state:
            stack.enter_context(surgery.mixed_batch(model, ["default", "__base__"]))
        out = model[name](given(name))
        assert torch.equal(model[name](input=given(name)), out)
        with pytest.raises(TypeError, match="missing 1 required positional argument: 'input'"):
            model[name]()


@pytest.mark.parametrize("state", ["one", "two", "off", "merged", "mixed", "saved", "saved, mixed", "quantized"])
def test_a_wrong_keyword_is_the_type_error_of_the_layer(state: str) -> None:
    model, x, saved = net(), given("q"), "saved" in state
    wrong = [{"x": x}, {"inputs": x}, {"input": x, "more": 1}, {"more": 1, "input": x}]
    told = []
    for named in wrong:
        with pytest.raises(TypeError) as raised:
            model["q"](**named)
        told.append(str(raised.value))
    targets, copies = (["other"], ["q"]) if saved else (["q"], None)
    config = surgery.LoraConfig(r=2, target_modules=targets, modules_to_save=copies, init_lora_weights=False)
    surgery.inject(model, config, **{"quantization_aware": "int8"} if state == "quantized" else {})
    if state == "two":
        surgery.inject(model, config, adapter_name="b")
        surgery.set_adapter(model, ["default", "b"])
    with ExitStack() as stack:
        if state == "off":
            stack.enter_context(surgery.disable_adapters(model))
        elif state == "merged":
            surgery.merge(model)
        elif "mixed" in state:
            stack.enter_context(surgery.mixed_batch(model, ["default", "__base__"]))
        model["q"](x)
        for named, wanted in zip(wrong, told, strict=True):
            with pytest.raises(TypeError) as raised:
                model["q"](**named)
            assert str(raised.value) == wanted
        with pytest.raises(TypeError):
            model["q"](x, x)


def test_a_model_shows_each_adapter_with_its_shapes() -> None:
    model = surgery.inject(net(), surgery.LoraConfig(r=2, target_modules=["q", "e"]))
    surgery.inject(model, surgery.LoraConfig(r=3, target_modules=["q"], use_dora=True), adapter_name="b")
    assert (
        repr(model)
        == """ModuleDict(
  (q): Adapted(
    (base_layer): Linear(in_features=8, out_features=4, bias=True)
    (lora_A): Slot(
      (default): Slot(weight: [2, 8])
      (b): Slot(weight: [3, 8])
    )
    (lora_B): Slot(
      (default): Slot(weight: [4, 2])
      (b): Slot(weight: [4, 3])
    )
    (lora_magnitude_vector): Slot(
      (b): Slot(weight: [4])
    )
  )
  (c): Conv2d(3, 4, kernel_size=(3, 3), stride=(1, 1))
  (e): Adapted(
    (base_layer): Embedding(10, 8)
    (lora_embedding_A): Slot(default: [2, 10])
    (lora_embedding_B): Slot(default: [8, 2])
  )
  (other): Linear(in_features=3, out_features=3, bias=True)
)"""
    )
