"""Calls of transformers' methods that cannot be served raise what they raise in transformers, and change nothing."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from adapted_llama import FIRST, adapted, llama, state, unchanged

import surgery

Call = Callable[[Any, Any, Path], object]

# Each on a model with an adapter "first", that the config given would make; and on one without adapters.
WRONG: dict[str, tuple[Call, type[Exception]]] = {
    "set another": (lambda model, *_: model.set_adapter("none"), ValueError),
    "set others": (lambda model, *_: model.set_adapter(["first", "none"]), ValueError),
    "add it again": (lambda model, config, _: model.add_adapter(config, "first"), ValueError),
    "add no config": (lambda model, *_: model.add_adapter(3, "second"), TypeError),
    "load it again": (lambda model, _, folder: model.load_adapter(folder, "first"), ValueError),
    "load nothing": (lambda model, *_: model.load_adapter(adapter_name="second"), ValueError),
    "swap another": (lambda model, _, folder: model.load_adapter(folder, "none", hotswap=True), ValueError),
    "delete another": (lambda model, *_: model.delete_adapter(["first", "none"]), ValueError),
}


BARE: dict[str, Call] = {
    "set": lambda model, *_: model.set_adapter("first"),
    "enable": lambda model, *_: model.enable_adapters(),
    "disable": lambda model, *_: model.disable_adapters(),
    "active": lambda model, *_: model.active_adapters(),
    "state": lambda model, *_: model.get_adapter_state_dict(),
    "delete": lambda model, *_: model.delete_adapter("first"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_call_raises_what_it_raises_in_transformers_and_changes_nothing(case: str, tmp_path: Path) -> None:
    call, kind = WRONG[case]
    model = surgery.inject(llama(), surgery.LoraConfig(**FIRST), adapter_name="first")
    model.save_pretrained(tmp_path)
    before = state(model)
    with pytest.raises(kind) as raised:
        call(model, surgery.LoraConfig(**FIRST), tmp_path)
    assert isinstance(raised.value, surgery.SurgeryError)
    assert unchanged(model, before)
    peft = pytest.importorskip("peft")
    theirs, config = llama(), peft.LoraConfig(**FIRST)
    theirs.add_adapter(config, "first")
    with pytest.raises(kind):
        call(theirs, config, tmp_path)


@pytest.mark.parametrize("case", BARE)
def test_a_call_without_adapters_raises_what_it_raises_in_transformers(case: str, tmp_path: Path) -> None:
    model = adapted()
    model.delete_adapter(["first", "second"])
    with pytest.raises(ValueError, match="no adapters") as raised:
        BARE[case](model, None, tmp_path)
    assert isinstance(raised.value, surgery.StateError)
    pytest.importorskip("peft")
    with pytest.raises(ValueError, match="No adapter loaded"):
        BARE[case](llama(), None, tmp_path)


def test_an_argument_that_cannot_be_served_is_refused(tmp_path: Path) -> None:
    model = adapted()
    model.save_pretrained(tmp_path)
    with pytest.raises(surgery.UsageError, match="HF_TOKEN"):
        model.load_adapter(tmp_path, "third", token="secret")
    with pytest.raises(surgery.UsageError, match="no_such"):
        model.load_adapter(tmp_path, "third", no_such=1)
    with pytest.raises(surgery.UsageError, match="where the model's layers are"):
        model.load_adapter(tmp_path, "third", device_map="auto")


@pytest.mark.parametrize("name", ["training", "items", "__base__"])
def test_a_word_that_modules_have_for_something_else_names_no_adapter(name: str) -> None:
    with pytest.raises(surgery.UsageError, match="this word for something else"):
        surgery.inject(llama(), surgery.LoraConfig(**FIRST), adapter_name=name)
