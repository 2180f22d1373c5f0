"""The methods that transformers' documentation calls work on the model itself, with peft installed or not."""

import copy
import inspect
import pickle
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


def test_a_merge_by_the_method_is_undone_to_the_bit() -> None:
    model = adapted()
    before, running = state(model), outputs(model)
    model.merge_adapter()
    assert not unchanged(model, before)
    model.unmerge_adapter()
    assert unchanged(model, before)
    assert torch.equal(outputs(model), running)


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


@pytest.mark.parametrize("options", [{"target_modules": ["lm_head"]}, {"modules_to_save": ["embed_tokens"]}], ids=str)
@pytest.mark.parametrize("tied", [False, True])
def test_a_vocabulary_under_an_adapter_keeps_its_size(options: dict[str, Any], tied: bool) -> None:
    model = surgery.inject(llama(tie_word_embeddings=tied), surgery.LoraConfig(**(FIRST | options)))
    before, size = state(model), model.config.vocab_size
    with pytest.raises(surgery.StateError, match=f"of {size} tokens; resize the model first"):
        model.resize_token_embeddings(size + 11)
    assert unchanged(model, before)
    model.resize_token_embeddings(size)
    assert unchanged(model, before)


@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": ["lm_head"]},
        {"target_modules": ["embed_tokens"]},
        {"modules_to_save": ["lm_head"]},
        {"modules_to_save": ["embed_tokens"]},
        {"trainable_token_indices": [1]},
    ],
    ids=str,
)
def test_tied_weights_under_adapters_are_tied_again_as_they_are(options: dict[str, Any]) -> None:
    model = surgery.inject(llama(tie_word_embeddings=True), surgery.LoraConfig(**(FIRST | options)))
    before, running = state(model), outputs(model)
    model.tie_weights()
    assert unchanged(model, before)
    assert torch.equal(outputs(model), running)
    surgery.eject(model).tie_weights()
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_a_vocabulary_beside_adapters_is_resized_as_ever(tmp_path: Path) -> None:
    model = adapted()
    size = model.config.vocab_size
    model.resize_token_embeddings(size + 3, pad_to_multiple_of=8, mean_resizing=False)
    grown = -(-(size + 3) // 8) * 8
    assert model(torch.tensor([[grown - 1]])).logits.shape[-1] == grown
    model.save_merged(tmp_path / "out")
    assert LlamaForCausalLM.from_pretrained(tmp_path / "out").config.vocab_size == grown


@pytest.mark.parametrize("name", ["training", "items", "__base__"])
def test_a_word_that_modules_have_for_something_else_names_no_adapter(name: str) -> None:
    with pytest.raises(surgery.UsageError, match="this word for something else"):
        llama_with(name)


def test_what_a_layer_holds_is_asked_for_as_in_peft() -> None:
    factors = adapted().model.layers[0].self_attn.q_proj.lora_A
    assert list(factors) == list(factors.keys()) == [name for name, _ in factors.items()]
    assert "first" in factors
    assert [one.weight.shape for one in factors.values()] == [factors[name].weight.shape for name in factors]


def llama_with(name: str) -> LlamaForCausalLM:
    return surgery.inject(llama(), surgery.LoraConfig(**FIRST), adapter_name=name)


def test_an_adapter_is_loaded_from_a_sub_folder_that_is_in_its_folder(tmp_path: Path) -> None:
    model = adapted()
    model.save_pretrained(tmp_path / "repository" / "inner")
    model.load_adapter(tmp_path / "repository", "third", adapter_kwargs={"subfolder": "inner"})
    assert model.active_adapters() == ["third"]
    for wrong in ("..", "none"):
        with pytest.raises(surgery.InputError):
            model.load_adapter(tmp_path / "repository", "fourth", subfolder=wrong)
