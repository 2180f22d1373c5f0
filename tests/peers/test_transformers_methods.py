"""The methods that transformers' documentation calls work on the model itself, with peft installed or not."""

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from adapted_llama import FIRST, SECOND, TOKENS, adapted, llama, outputs, state, trained, unchanged
from guarded import is_guarded
from torch import Tensor, nn
from transformers import LlamaForCausalLM, PreTrainedModel
from transformers.integrations.peft import PeftAdapterMixin

import surgery

METHODS = [
    "add_adapter",
    "load_adapter",
    "set_adapter",
    "enable_adapters",
    "disable_adapters",
    "active_adapters",
    "get_adapter_state_dict",
    "delete_adapter",
    "save_pretrained",
]


@pytest.mark.parametrize("option", ["distributed_checkpoint", "never_heard_of"])
def test_an_option_of_saving_that_is_not_known_is_refused(option: str, tmp_path: Path) -> None:
    with pytest.raises(surgery.UsageError, match=option):
        adapted().save_pretrained(tmp_path / "out", **{option: True})
    assert not (tmp_path / "out").exists()
    adapted().save_pretrained(tmp_path / "out", **{option: False})
    assert (tmp_path / "out").exists()


@pytest.mark.skipif(not is_guarded(), reason="peft is here")
def test_where_peft_is_not_installed_it_cannot_be_imported_and_transformers_refuses() -> None:
    with pytest.raises(ModuleNotFoundError):
        import peft  # noqa: F401
    with pytest.raises(ValueError, match="PEFT is not installed"):
        llama().add_adapter(surgery.LoraConfig(**FIRST))


@pytest.mark.parametrize("name", METHODS)
def test_a_method_takes_the_arguments_that_it_takes_in_transformers(name: str) -> None:
    theirs = inspect.signature(getattr(PeftAdapterMixin, name, getattr(PreTrainedModel, name))).parameters
    ours = inspect.signature(getattr(type(adapted()), name)).parameters
    wanted = [one for one in theirs if one not in ("load_config", "save_original_format", "distributed_checkpoint")]
    assert list(ours) == wanted
    assert {one: ours[one].default for one in wanted} == {one: theirs[one].default for one in wanted}


def test_the_model_keeps_its_kind_and_name() -> None:
    model = adapted()
    assert isinstance(model, LlamaForCausalLM)
    assert type(model).__name__ == "LlamaForCausalLM"
    assert str(type(model)) == str(LlamaForCausalLM)
    assert type(model) is type(adapted())


def test_adapters_of_other_ranks_and_targets_are_switched_and_run_together() -> None:
    model, base = adapted(), outputs(llama())
    first = outputs(model)
    model.set_adapter("second")
    second = outputs(model)
    model.set_adapter(["first", "second"])
    assert model.active_adapters() == ["first", "second"]
    found = [base, first, second, outputs(model)]
    assert not any(torch.equal(one, other) for at, one in enumerate(found) for other in found[:at])
    model.disable_adapters()
    assert torch.equal(outputs(model), base)
    model.enable_adapters()
    assert torch.equal(outputs(model), found[3])


def test_only_the_adapter_that_runs_is_trained_and_a_loaded_one_is_not(tmp_path: Path) -> None:
    model = adapted()
    assert trained(model) == {name for name in model.state_dict() if ".first." in name}
    model.set_adapter("second")
    assert trained(model) == {name for name in model.state_dict() if ".second." in name}
    model.save_pretrained(tmp_path)
    model.load_adapter(tmp_path, "third")
    assert model.active_adapters() == ["third"]
    assert trained(model) == set()
    model.load_adapter(tmp_path, "fourth", is_trainable=True)
    assert trained(model) == {name for name in model.state_dict() if ".fourth." in name}


def test_the_active_adapter_is_saved_alone_and_loaded_again_with_equal_outputs(tmp_path: Path) -> None:
    model = adapted()
    model.set_adapter("second")
    model.save_pretrained(tmp_path)
    files = {"adapter_config.json", "adapter_model.safetensors", "surgery.base.json"}
    assert {path.name for path in tmp_path.iterdir()} == files
    again = surgery.load(llama(), tmp_path)
    assert torch.equal(outputs(again), outputs(model))
    assert again.active_adapters() == ["default"]


def test_several_active_adapters_are_saved_each_in_its_folder(tmp_path: Path) -> None:
    model = adapted()
    model.set_adapter(["first", "second"])
    model.save_pretrained(tmp_path)
    again = surgery.load(llama(), tmp_path / "first", adapter_name="first")
    again.load_adapter(tmp_path / "second", "second")
    again.set_adapter(["first", "second"])
    assert torch.equal(outputs(again), outputs(model))


def test_a_process_that_is_not_the_main_one_saves_nothing(tmp_path: Path) -> None:
    adapted().save_pretrained(tmp_path, is_main_process=False)
    assert list(tmp_path.iterdir()) == []


def test_tensors_come_from_a_state_dict_that_is_given(tmp_path: Path) -> None:
    model = adapted()
    doubled = {name: 2 * values for name, values in model.state_dict().items()}
    found, wanted = model.get_adapter_state_dict("second", doubled), model.get_adapter_state_dict("second")
    assert found.keys() == wanted.keys()
    assert all(torch.equal(values, 2 * wanted[name]) for name, values in found.items())
    model.save_pretrained(tmp_path, state_dict=doubled)
    assert not torch.equal(outputs(surgery.load(llama(), tmp_path)), outputs(model))
    with pytest.raises(surgery.MatchError, match="state_dict of this model"):
        model.get_adapter_state_dict("second", {})


def test_an_adapter_is_made_of_a_config_and_a_state_dict() -> None:
    model, fresh = adapted(), surgery.inject(llama(), surgery.LoraConfig(**SECOND), adapter_name="other")
    fresh.load_adapter(peft_config=FIRST | {"peft_type": "LORA"}, adapter_state_dict=model.get_adapter_state_dict())
    assert fresh.active_adapters() == ["default"]
    assert torch.equal(outputs(fresh), outputs(model))


def test_a_swapped_adapter_keeps_its_parameters_and_what_is_compiled(tmp_path: Path) -> None:
    base = llama()
    torch.manual_seed(1)
    other = surgery.inject(base, surgery.LoraConfig(**FIRST))
    other.save_pretrained(tmp_path)
    model = adapted()
    parameters = {name: id(values) for name, values in model.named_parameters()}
    runs = 0

    def counted(graph: torch.fx.GraphModule, _: list[Tensor]) -> Callable[..., Any]:
        nonlocal runs
        runs += 1
        return graph.forward

    compiled = torch.compile(model, fullgraph=True, backend=counted)
    with torch.no_grad():
        assert torch.equal(compiled(TOKENS).logits, outputs(model))
        assert not torch.equal(outputs(model), outputs(other))
        model.load_adapter(tmp_path, "first", hotswap=True)
        assert torch.equal(compiled(TOKENS).logits, outputs(other))
    assert runs == 1
    assert {name: id(values) for name, values in model.named_parameters()} == parameters


def test_a_swap_takes_the_scaling_of_the_file_and_refuses_another_rank_or_place(tmp_path: Path) -> None:
    scaled = surgery.inject(llama(), surgery.LoraConfig(**FIRST, lora_alpha=32))
    scaled.save_pretrained(tmp_path / "scaled")
    model = adapted()
    model.load_adapter(tmp_path / "scaled", "first", hotswap=True)
    assert torch.equal(outputs(model), outputs(scaled))
    surgery.inject(llama(), surgery.LoraConfig(**(FIRST | {"r": 3}))).save_pretrained(tmp_path / "rank")
    before = state(model)
    with pytest.raises(surgery.ShapeError, match="in the model's adapter 'first' it is"):
        model.load_adapter(tmp_path / "rank", "first", hotswap=True)
    with pytest.raises(surgery.MatchError, match="it does not adapt"):
        model.load_adapter(tmp_path / "rank", "second", hotswap=True)
    assert unchanged(model, before)


@pytest.mark.parametrize(("here", "there"), [(False, True), (True, False)], ids=["DoRA for LoRA", "LoRA for DoRA"])
def test_a_swap_is_of_the_same_tensors(here: bool, there: bool, tmp_path: Path) -> None:
    surgery.inject(llama(), surgery.LoraConfig(**FIRST, use_dora=there)).save_pretrained(tmp_path)
    model = surgery.inject(llama(), surgery.LoraConfig(**FIRST, use_dora=here), adapter_name="first")
    before = state(model)
    with pytest.raises(surgery.MatchError, match="the same tensors are wanted"):
        model.load_adapter(tmp_path, "first", hotswap=True)
    assert unchanged(model, before)


def test_deleted_adapters_leave_no_module_and_others_run_on() -> None:
    model = adapted()
    model.set_adapter(["first", "second"])
    model.delete_adapter("first")
    assert model.active_adapters() == ["second"]
    alone = llama()
    names = [name for name, _ in alone.named_modules()]
    model.delete_adapter(["second"])
    assert [name for name, _ in model.named_modules()] == names
    assert torch.equal(outputs(model), outputs(alone))
    assert not model._hf_peft_config_loaded
    model.add_adapter(surgery.LoraConfig(**FIRST))
    assert model.active_adapters() == ["default"]


def test_without_adapters_the_model_itself_is_saved(tmp_path: Path) -> None:
    model = adapted()
    model.delete_adapter(["first", "second"])
    model.save_pretrained(tmp_path)
    assert torch.equal(outputs(LlamaForCausalLM.from_pretrained(tmp_path)), outputs(model))


@pytest.mark.parametrize("merged", [False, True], ids=["added", "merged"])
def test_ejecting_gives_the_very_class_and_attributes_back(merged: bool) -> None:
    model = llama()
    before, names = set(model.__dict__), state(model)
    surgery.inject(model, surgery.LoraConfig(**FIRST))
    model.add_adapter(surgery.LoraConfig(**SECOND), "second")
    if merged:
        model.merge_adapter()
    surgery.eject(model)
    assert type(model) is LlamaForCausalLM
    assert set(model.__dict__) == before
    assert unchanged(model, names)
    assert all(values.requires_grad for values in model.parameters())


def test_a_model_whose_adapters_were_all_deleted_can_still_be_ejected() -> None:
    model = adapted()
    model.delete_adapter(["first", "second"])
    surgery.eject(model)
    assert type(model) is LlamaForCausalLM
    assert all(values.requires_grad for values in model.parameters())


def test_modules_that_are_no_model_of_transformers_stay_of_their_class() -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    surgery.inject(model, surgery.LoraConfig(r=2, target_modules=["0"]))
    assert type(model) is nn.Sequential


def test_a_merge_by_the_method_is_undone_to_the_bit() -> None:
    model = adapted()
    before, running = state(model), outputs(model)
    model.merge_adapter()
    assert not unchanged(model, before)
    model.unmerge_adapter()
    assert unchanged(model, before)
    assert torch.equal(outputs(model), running)


def test_an_adapter_is_loaded_from_a_sub_folder_that_is_in_its_folder(tmp_path: Path) -> None:
    model = adapted()
    model.save_pretrained(tmp_path / "repository" / "inner")
    model.load_adapter(tmp_path / "repository", "third", adapter_kwargs={"subfolder": "inner"})
    assert model.active_adapters() == ["third"]
    for wrong in ("..", "none"):
        with pytest.raises(surgery.InputError):
            model.load_adapter(tmp_path / "repository", "fourth", subfolder=wrong)


def test_what_a_layer_holds_is_asked_for_as_in_peft() -> None:
    factors = adapted().model.layers[0].self_attn.q_proj.lora_A
    assert list(factors) == list(factors.keys()) == [name for name, _ in factors.items()]
    assert "first" in factors
    assert [one.weight.shape for one in factors.values()] == [factors[name].weight.shape for name in factors]
