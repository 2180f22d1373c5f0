"""An adapter is swapped for another of its own rank and alpha, in place, and nothing is compiled anew."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

import surgery

SMALL = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4, "vocab_size": 99}
TOKENS = torch.arange(24).reshape(2, 12)
EPS = torch.finfo(torch.float32).eps
TARGETS = ["q_proj", "down_proj", "embed_tokens"]
ROOM = 8
ADAPTERS: dict[str, dict[str, Any]] = {  # the first is loaded, the others take its place
    "first": {"r": 4, "lora_alpha": 8},
    "another alpha": {"r": 4, "lora_alpha": 3},
    "a lower rank": {"r": 2, "lora_alpha": 8},
    "all the room": {"r": ROOM, "lora_alpha": 8, "use_rslora": True},
    "patterns": {
        "r": 4,
        "rank_pattern": {"down_proj": 7},
        "alpha_pattern": {"0.self_attn.q_proj": 31, "embed_tokens": 1},
    },
    "fewer modules": {"r": 3, "target_modules": ["q_proj"]},
}


def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SMALL)).eval()


def outputs(model: Any) -> Tensor:
    with torch.no_grad():
        return model(TOKENS).logits


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: values.clone() for name, values in model.state_dict().items()}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("adapters")
    for seed, (name, fields) in enumerate(ADAPTERS.items()):
        model = llama()
        torch.manual_seed(seed + 1)
        config = surgery.LoraConfig(**({"target_modules": TARGETS, "init_lora_weights": False} | fields))
        surgery.save(surgery.inject(model, config), folder / name)
    return folder


def roomy(saved: Path, name: str = "first") -> LlamaForCausalLM:
    model = llama()
    model.enable_peft_hotswap(target_rank=ROOM)
    return surgery.load(model, saved / name)


def assert_close(found: Tensor, wanted: Tensor) -> None:
    # B is scaled before the product and not after it, and the products have other lengths: each of at most 2 + 2
    # layers rounds sums of at most 64 terms otherwise.
    torch.testing.assert_close(found, wanted, rtol=0, atol=4 * 64 * EPS * float(wanted.abs().max()))


@pytest.mark.parametrize(
    "fields",
    [
        {"use_dora": True},
        {"use_qalora": True, "qalora_group_size": 8},
        {"use_bdlora": {"target_modules_bd_a": ["proj"], "nblocks": 2}},
    ],
    ids=lambda one: next(iter(one)),
)
def test_the_room_of_lora_is_for_no_other_method(fields: dict[str, Any], saved: Path, tmp_path: Path) -> None:
    config = surgery.LoraConfig(r=4, target_modules=["q_proj"], **fields)
    surgery.save(surgery.inject(llama(), config), tmp_path)
    model = roomy(saved, "fewer modules")
    before = state(model)
    with pytest.raises(surgery.MatchError, match="delete that adapter and load this"):
        model.load_adapter(tmp_path, "default", hotswap=True)
    assert all(torch.equal(values, before[name]) for name, values in model.state_dict().items())


def test_none_of_several_adapters_makes_anything_compile_anew(saved: Path) -> None:
    model = roomy(saved)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    assert_close(outputs(compiled), outputs(surgery.load(llama(), saved / "first")))
    for name in [*ADAPTERS][1:]:
        model.load_adapter(saved / name)  # "auto" swaps, since the name is taken
        with torch.compiler.set_stance("fail_on_recompile"):
            found = outputs(compiled)
        assert_close(found, outputs(surgery.load(llama(), saved / name)))
        assert model.active_adapters() == ["default"]


def test_without_room_another_alpha_makes_it_compile_anew(saved: Path) -> None:
    """So that the test before this one could fail."""
    model = surgery.load(llama(), saved / "first")
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    outputs(compiled)
    model.load_adapter(saved / "another alpha", hotswap=True)
    with pytest.raises(RuntimeError, match="recompile"), torch.compiler.set_stance("fail_on_recompile"):
        outputs(compiled)
    assert torch.equal(outputs(model), outputs(surgery.load(llama(), saved / "another alpha")))


@pytest.mark.parametrize("name", ADAPTERS)
def test_a_swapped_adapter_is_merged_saved_and_swapped_back_to_the_bit(name: str, saved: Path, tmp_path: Path) -> None:
    model, fresh = roomy(saved), surgery.load(llama(), saved / name)
    before = state(model)
    model.load_adapter(saved / name, "default", hotswap=True)
    model.save_pretrained(tmp_path / "again")
    model.save_pretrained(tmp_path / "given", state_dict=model.state_dict())
    files = [(folder / "adapter_model.safetensors").read_bytes() for folder in (tmp_path / "again", tmp_path / "given")]
    assert files[0] == files[1]
    if name != "fewer modules":  # else there are zeros, where the file has nothing
        assert files[0] == (saved / name / "adapter_model.safetensors").read_bytes()
    assert torch.equal(outputs(surgery.load(llama(), tmp_path / "again")), outputs(fresh))
    for one in (model, fresh):
        surgery.merge(one)
    assert torch.equal(outputs(model), outputs(fresh))
    surgery.unmerge(model)
    model.load_adapter(saved / "first")
    assert all(torch.equal(values, before[key]) for key, values in model.state_dict().items())


def test_what_there_is_no_room_for_is_refused_and_changes_nothing(saved: Path, tmp_path: Path) -> None:
    for name, fields in {
        "rank": {"r": ROOM + 1, "target_modules": ["q_proj"]},
        "more": {"target_modules": ["k_proj"]},
    }.items():
        surgery.save(surgery.inject(llama(), surgery.LoraConfig(**fields)), tmp_path / name)
    model = roomy(saved)
    before = state(model)
    with pytest.raises(surgery.ShapeError, match=r"q_proj: r is 9, and there is room for 8; call enable_peft_hotswap"):
        model.load_adapter(tmp_path / "rank")
    with pytest.raises(surgery.MatchError, match=r"it adapts .*k_proj"):
        model.load_adapter(tmp_path / "more")
    assert all(torch.equal(values, before[key]) for key, values in model.state_dict().items())
    empty = llama()
    empty.enable_peft_hotswap(target_rank=ROOM)
    with pytest.raises(surgery.ShapeError, match="room for 8"):
        surgery.load(empty, tmp_path / "rank")
    assert state(empty).keys() == state(llama()).keys()


def test_what_is_told_not_to_swap_does_not(saved: Path) -> None:
    model = roomy(saved)
    with pytest.raises(surgery.StateError, match="is there already"):
        model.load_adapter(saved / "patterns", hotswap=False)
    model.load_adapter(saved / "patterns", "second")
    assert model.active_adapters() == ["second"]
    assert_close(outputs(model), outputs(surgery.load(llama(), saved / "patterns")))


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_one_with_room_is_trained_as_one_without(dropout: float, tmp_path: Path) -> None:
    config = surgery.LoraConfig(r=3, lora_alpha=6, lora_dropout=dropout, target_modules=["q_proj", "embed_tokens"])
    surgery.save(surgery.inject(llama(), config), tmp_path / "fresh")
    trained = []
    for room in (None, ROOM):
        model = llama()
        if room is not None:
            model.enable_peft_hotswap(target_rank=room)
        surgery.load(model, tmp_path / "fresh", trainable=True).train()
        optimizer = torch.optim.SGD([one for one in model.parameters() if one.requires_grad], lr=0.1)
        torch.manual_seed(1)
        for _ in range(3):
            model(TOKENS, labels=TOKENS).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        trained.append(model)
    roomy_A = trained[1].model.layers[0].self_attn.q_proj.lora_A.default.weight
    assert roomy_A.shape == (ROOM, 32)
    assert not roomy_A[3:].any()
    assert_close(outputs(trained[1].eval()), outputs(trained[0].eval()))


def test_a_scaling_keeps_its_bits_where_the_model_goes_to_another_dtype(saved: Path) -> None:
    model = roomy(saved, "patterns")
    model.to(torch.bfloat16).to(torch.float32)
    held = model.model.layers[0].self_attn.q_proj.lora_scaling.default
    assert held.view(torch.float64).item() == 31 / 4


def test_the_methods_of_a_model_whose_adapters_are_all_gone_are_those_of_a_fresh_one(saved: Path) -> None:
    model = surgery.load(llama(), saved / "first")
    with pytest.raises(RuntimeError, match="before loading the first adapter"):  # transformers' own
        model.enable_peft_hotswap(target_rank=ROOM)
    model.delete_adapter("default")
    model.enable_peft_hotswap(target_rank=ROOM)
    model.load_adapter(saved / "first")
    model.load_adapter(saved / "all the room")
    assert_close(outputs(model), outputs(surgery.load(llama(), saved / "all the room")))


def test_transformers_with_peft_keeps_the_first_alpha_and_refuses_another_rank(saved: Path) -> None:
    """What ours is for; when this fails, it may no longer be."""
    pytest.importorskip("peft")
    wanted = {name: outputs(surgery.load(llama(), saved / name)) for name in ("first", "another alpha")}
    model = llama()
    model.enable_peft_hotswap(target_rank=ROOM)
    model.load_adapter(saved / "first")
    assert_close(outputs(model), wanted["first"])
    model.load_adapter(saved / "another alpha", "default", hotswap=True)
    with pytest.raises(AssertionError, match="not close"):
        assert_close(outputs(model), wanted["another alpha"])
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        model.load_adapter(saved / "a lower rank", "default", hotswap=True)
