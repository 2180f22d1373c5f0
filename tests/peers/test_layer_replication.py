"""layer_replication: layers stacked anew, that share weights and have factors of their own; beside peft."""

import copy
from collections.abc import Callable
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertModel,
    GPT2Config,
    GPT2Model,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

import surgery
from surgery import LoraConfig

SIZES = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "vocab_size": 29}
WIDE = {**SIZES, "intermediate_size": 24, "num_key_value_heads": 2}
TOKENS = torch.arange(9)[None]
RANGES = [[0, 2], [1, 3], [0, 1]]
KINDS: dict[str, tuple[Callable[[], nn.Module], list[str]]] = {
    "llama": (lambda: LlamaForCausalLM(LlamaConfig(**WIDE)), ["q_proj", "down_proj"]),
    "bert": (lambda: BertModel(BertConfig(**SIZES, intermediate_size=24)), ["query"]),
    "gpt2": (lambda: GPT2Model(GPT2Config(n_embd=16, n_layer=3, n_head=2, vocab_size=29)), ["c_attn"]),
}
each_kind = pytest.mark.parametrize("kind", KINDS)


def made(kind: str = "llama") -> nn.Module:
    torch.manual_seed(0)
    return KINDS[kind][0]().eval()


def fields(kind: str = "llama", **more: object) -> dict[str, object]:
    given = {"r": 2, "target_modules": KINDS[kind][1], "layer_replication": RANGES, "init_lora_weights": False}
    return given | more


def outputs(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(TOKENS)[0]


def injected(kind: str = "llama", **more: object) -> nn.Module:
    torch.manual_seed(1)
    return surgery.inject(made(kind), LoraConfig(**fields(kind, **more)))


def near(found: Tensor, wanted: Tensor) -> None:
    """Five layers, in each of which sums of at most 24 terms may go in another order."""
    eps = torch.finfo(torch.float32).eps
    torch.testing.assert_close(found, wanted, rtol=0, atol=5 * 24 * eps * float(wanted.abs().max()))


@each_kind
def test_each_reads_the_files_of_the_other_to_the_same_outputs(kind: str, tmp_path: Path) -> None:
    torch.manual_seed(1)
    theirs = peft.get_peft_model(made(kind), peft.LoraConfig(**fields(kind))).eval()
    theirs.save_pretrained(tmp_path / "theirs")
    ours = surgery.load(made(kind), tmp_path / "theirs")
    near(outputs(ours), outputs(theirs))
    surgery.save(ours, tmp_path / "ours")
    written, given = (load_file(tmp_path / one / "adapter_model.safetensors") for one in ("ours", "theirs"))
    assert written.keys() == given.keys()
    assert all(torch.equal(values, written[name]) for name, values in given.items())
    back = peft.PeftModel.from_pretrained(made(kind), tmp_path / "ours").eval()
    near(outputs(back), outputs(theirs))


@each_kind
def test_the_model_is_as_it_was_once_the_adapter_is_out(kind: str) -> None:
    model = made(kind)
    next(model.parameters()).requires_grad_(False)
    modules, flags = dict(model.named_modules()), {name: p.requires_grad for name, p in model.named_parameters()}
    before, state, told = outputs(model), copy.deepcopy(model.state_dict()), model.config.to_dict()
    surgery.inject(model, LoraConfig(**fields(kind)))
    assert model.config.num_hidden_layers == 5
    model.train().double().float()
    surgery.eject(model)
    assert all(module is modules[name] and module.training for name, module in model.named_modules())
    assert {name: p.requires_grad for name, p in model.named_parameters()} == flags
    assert all(torch.equal(values, state[name]) for name, values in model.state_dict().items())
    assert model.config.to_dict() == told
    assert torch.equal(outputs(model.eval()), before)


def test_layers_share_weights_and_train_factors_of_their_own() -> None:
    model = injected(init_lora_weights=True)
    layers = model.model.layers
    assert [len(layers), layers[3].self_attn.layer_idx] == [5, 3]
    assert layers[1].mlp.up_proj.weight is layers[2].mlp.up_proj.weight
    model(TOKENS)[0].square().sum().backward()
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert len(trained) == 5 * 2 * 2
    assert all(p.grad is not None for p in trained.values())
    assert {p.grad is None for name, p in model.named_parameters() if "lora_" not in name} == {True}
    chosen = surgery.inject(made(), LoraConfig(**fields(layers_to_transform=[4])))
    assert {n for n, _ in chosen.named_parameters() if "lora_A" in n} == {
        n for n in trained if ".4." in n and "_A" in n
    }


def test_generation_caches_each_layer_of_the_stack(tmp_path: Path) -> None:
    model = injected()
    surgery.save(model, tmp_path)
    theirs = peft.PeftModel.from_pretrained(made(), tmp_path)
    tokens = [one.generate(input_ids=TOKENS, max_new_tokens=8, do_sample=False) for one in (model, theirs)]
    assert torch.equal(*tokens)
    assert torch.equal(tokens[0], model.generate(input_ids=TOKENS, max_new_tokens=8, do_sample=False, use_cache=False))


def test_what_a_config_says_of_each_layer_follows_where_peft_fails() -> None:
    torch.manual_seed(0)
    kinds = ["full_attention", "sliding_attention", "full_attention"]
    config = Qwen3Config(**WIDE, head_dim=8, layer_types=kinds, use_sliding_window=True, sliding_window=4)
    model = Qwen3ForCausalLM(config)
    with pytest.raises(IndexError):
        peft.get_peft_model(copy.deepcopy(model), peft.LoraConfig(**fields()))(TOKENS)
    ours = surgery.inject(model, LoraConfig(**fields()))
    assert [kind[:4] for kind in ours.config.layer_types] == ["full", "slid", "slid", "full", "full"]
    outputs(ours)
    assert len(surgery.eject(ours).config.layer_types) == 3


def test_a_merge_is_refused_with_the_reason_live_and_on_files(tmp_path: Path) -> None:
    model, words = injected(), "layer_replication.*share one weight.*leave it unmerged"
    before = outputs(model)
    made().save_pretrained(tmp_path / "base")
    surgery.save(model, tmp_path / "adapter")
    for merge in (surgery.merge, lambda one: surgery.save_merged(one, tmp_path / "merged")):
        with pytest.raises(surgery.MatchError, match=words):
            merge(model)
    assert torch.equal(outputs(model), before)
    plan = surgery.plan(tmp_path / "base", tmp_path / "adapter")
    assert [type(error) for error in plan.refusals] == [surgery.MatchError]
    with pytest.raises(surgery.MatchError, match=words):
        surgery.merge_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_adapters_of_a_model_are_over_one_stack(tmp_path: Path) -> None:
    model = injected()
    surgery.save(model, tmp_path)
    surgery.load(model, tmp_path, adapter_name="again")
    with surgery.set_adapter(model, "again"):
        again = outputs(model)
    assert torch.equal(again, outputs(model))
    for ranges, words in (([[0, 2]], "over layers 0, 1; one"), (None, "over the model's own layers; one")):
        with pytest.raises(surgery.StateError, match=words):
            surgery.inject(model, LoraConfig(**fields(layer_replication=ranges)), adapter_name="other")
    plain = surgery.inject(made(), LoraConfig(**fields(layer_replication=None)))
    with pytest.raises(surgery.StateError, match="over the model's own layers, and this one is over layers 0, 1, 1, 2"):
        surgery.load(plain, tmp_path, adapter_name="other")


def test_the_last_adapter_takes_the_stack_with_it_and_one_that_is_refused_leaves_none() -> None:
    model, before = injected(), outputs(made())
    model.delete_adapter("default")
    assert torch.equal(outputs(model), before)
    with pytest.raises(surgery.MatchError, match="nothing matches 'nowhere'"):
        surgery.inject(model, LoraConfig(**fields(target_modules=["nowhere"])))
    assert [len(model.model.layers), model.config.num_hidden_layers] == [3, 3]


@pytest.mark.parametrize(
    ("ranges", "words"),
    [
        ([], "a list of pairs is wanted"),
        ([[0, 2], [1]], "a list of pairs is wanted"),
        ([[2, 2]], "a list of pairs is wanted"),
        ([[-1, 2]], "a list of pairs is wanted"),
        ([[0, True]], "a list of pairs is wanted"),
        ("0..2", "a list of pairs is wanted"),
        ([[0, 1 << 40]], "stacks 1099511627776 layers; at most"),
        ([[2, 4]], "it takes layer 3, and the model has 3"),
    ],
    ids=str,
)
def test_ranges_that_cannot_be_are_refused(ranges: object, words: str) -> None:
    with pytest.raises(surgery.SurgeryError, match=f"layer_replication.*{words}"):
        surgery.inject(made(), LoraConfig(**fields(layer_replication=ranges)))


def test_what_goes_without_a_stack_is_refused_by_name() -> None:
    with pytest.raises(surgery.ConfigError, match=r"layer_replication .* bias 'none' alone"):
        LoraConfig(**fields(bias="all"))
    with pytest.raises(surgery.MatchError, match="no list of layers where PEFT looks"):
        surgery.inject(nn.ModuleDict({"q_proj": nn.Linear(2, 2)}), LoraConfig(**fields(target_modules=["q_proj"])))
