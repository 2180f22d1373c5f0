"""Rows of tokens alone, PEFT's TRAINABLE_TOKENS, to peft and from it: outputs, gradients, files and merges."""

import copy
import json
from pathlib import Path

import peft
import pytest
import torch
from click.testing import CliRunner
from pairs import judge_merge_of_peft, merge_live_and_on_files, outputs, trainable, trained
from safetensors.torch import load_file
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, T5Config, T5Model

import surgery
from surgery import ConfigError, FormatError, MatchError, TrainableTokensConfig
from surgery.cli import surgery as command

SMALL = {
    **{"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "vocab_size": 24, "head_dim": 8},
    **{"num_attention_heads": 2, "num_key_value_heads": 1},
}
TOKENS = [3, 1, 11]
TARGETS = {"none": None, "embedding": ["embed_tokens"], "head": ["lm_head"], "both": ["embed_tokens", "lm_head"]}
FILE, TENSORS = "model.safetensors", "adapter_model.safetensors"
each_target = pytest.mark.parametrize("target", TARGETS)
each_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)


def llama(dtype: torch.dtype = torch.float32, tied: bool = False) -> nn.Module:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SMALL, tie_word_embeddings=tied)).to(dtype).eval()


def by_peft(model: nn.Module, target: str) -> nn.Module:
    """Its rows have been trained."""
    config = peft.TrainableTokensConfig(token_indices=TOKENS, target_modules=copy.copy(TARGETS[target]))
    return trained(peft.get_peft_model(copy.deepcopy(model), config), 1.0)


def room(model: nn.Module, theirs: nn.Module, target: str) -> float:
    """None, but for a head: its rows are multiplied by themselves, 16 terms each, and may be added otherwise."""
    eps = torch.finfo(next(model.parameters()).dtype).eps
    return 2 * (16 + 4) * eps * float(outputs(theirs).abs().max()) if target in ("head", "both") else 0.0


def apart(one: nn.Module, other: nn.Module) -> float:
    return float((outputs(one) - outputs(other)).abs().max())


def same_files(one: Path, other: Path) -> bool:
    found, wanted = (load_file(folder / TENSORS) for folder in (one, other))
    return found.keys() == wanted.keys() and all(torch.equal(found[name], wanted[name]) for name in wanted)


@each_dtype
@each_target
def test_files_go_both_ways_with_the_same_tensors_and_outputs(target: str, dtype: torch.dtype, tmp_path: Path) -> None:
    model = llama(dtype)
    theirs = by_peft(model, target)
    theirs.save_pretrained(tmp_path / "theirs")
    ours = surgery.load(copy.deepcopy(model), tmp_path / "theirs")
    assert apart(ours, theirs) <= room(model, theirs, target)
    assert apart(ours, model) > room(model, theirs, target)
    surgery.save(ours, tmp_path / "ours")
    assert same_files(tmp_path / "ours", tmp_path / "theirs")
    assert torch.equal(outputs(peft.PeftModel.from_pretrained(model, tmp_path / "ours").eval()), outputs(theirs))


@each_target
def test_a_fresh_one_is_named_and_shaped_as_in_peft_and_changes_nothing(target: str) -> None:
    config = {"token_indices": TOKENS, "target_modules": TARGETS[target]}
    theirs = peft.get_peft_model(llama(), peft.TrainableTokensConfig(**copy.deepcopy(config)))
    ours = surgery.inject(llama(), TrainableTokensConfig(**config))
    assert trainable(ours) == trainable(theirs)
    assert apart(ours, llama()) <= room(ours, theirs, target)
    grads = []
    for one in (ours, theirs):
        one(torch.arange(12)[None])[0].square().sum().backward()
        found = [v.grad for name, v in sorted(one.named_parameters(), key=lambda p: p[0][-40:]) if v.grad is not None]
        grads.append(found)
    assert len(grads[0]) == len(grads[1]) > 0
    for mine, wanted in zip(*grads, strict=True):
        # Sums of as many terms as there are tokens in the input and logits of each, in another order.
        assert float((mine - wanted).abs().max()) <= 4 * (12 * 24 + 4) * 2.0**-23 * float(wanted.abs().max())


@pytest.mark.parametrize("target", ["none", "embedding"])
def test_tied_modules_have_the_same_rows_live_in_files_and_in_merges(target: str, tmp_path: Path) -> None:
    model = llama(tied=True)
    theirs = by_peft(model, target)
    config = TrainableTokensConfig(token_indices=TOKENS, target_modules=TARGETS[target])
    assert trainable(surgery.inject(copy.deepcopy(model), config)) == trainable(theirs)
    theirs.save_pretrained(tmp_path / "theirs")
    model.save_pretrained(tmp_path / "base")
    ours = surgery.load(copy.deepcopy(model), tmp_path / "theirs")
    assert apart(ours, theirs) <= room(model, theirs, "head")
    assert ours.lm_head.fitted["default"].params["t"] is ours.model.embed_tokens.fitted["default"].params["t"]
    surgery.save(ours, tmp_path / "ours")
    assert same_files(tmp_path / "ours", tmp_path / "theirs")
    again = peft.PeftModel.from_pretrained(copy.deepcopy(model), tmp_path / "ours").eval()
    assert torch.equal(outputs(again), outputs(theirs))
    surgery.merge_checkpoint(tmp_path / "base", tmp_path / "theirs", tmp_path / "out", reversible=True)
    surgery.verify_checkpoint(tmp_path / "base", tmp_path / "theirs", tmp_path / "out").require()
    merged = LlamaForCausalLM.from_pretrained(tmp_path / "out").eval()
    assert merged.config.tie_word_embeddings
    assert "lm_head.weight" not in load_file(tmp_path / "out" / FILE)
    assert torch.equal(outputs(merged), outputs(surgery.eject(surgery.merge(ours), keep_merged=True)))
    assert torch.equal(merged.lm_head.weight, theirs.merge_and_unload().lm_head.weight)
    surgery.unmerge_checkpoint(tmp_path / "out", tmp_path / "back")
    assert (tmp_path / "back" / FILE).read_bytes() == (tmp_path / "base" / FILE).read_bytes()


def test_rows_of_tied_modules_that_differ_are_refused_by_name(tmp_path: Path) -> None:
    model = llama(tied=True)
    by_peft(llama(), "both").save_pretrained(tmp_path / "adapter")
    model.save_pretrained(tmp_path / "base")
    with pytest.raises(MatchError, match=r"is tied to .*, and the adapter makes something else of it"):
        surgery.load(model, tmp_path / "adapter")
    with pytest.raises(MatchError, match="the adapters make another tensor of each; `tied=untie`"):
        surgery.merge_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")


@each_dtype
@each_target
def test_merges_live_and_on_files_agree_and_come_back(target: str, dtype: torch.dtype, tmp_path: Path) -> None:
    model = llama(dtype)
    by_peft(model, target).save_pretrained(tmp_path / "adapter")
    model.save_pretrained(tmp_path / "base")
    ours = surgery.load(copy.deepcopy(model), tmp_path / "adapter")
    changed = merge_live_and_on_files(tmp_path / "base", tmp_path / "adapter", ours, tmp_path)
    assert len(changed) == (2 if target == "both" else 1)
    report = surgery.verify_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    assert report.counts["bits"] == len(changed)


@pytest.mark.parametrize("safe", [False, True], ids=["merge", "safe_merge"])
@each_target
def test_a_merge_by_peft_passes_verify_and_one_that_forgot_a_tensor_does_not(
    target: str, safe: bool, tmp_path: Path
) -> None:
    model = llama()
    judge_merge_of_peft(model, by_peft(model, target), tmp_path, safe)


def test_the_embedding_of_a_model_is_the_one_that_it_says_as_in_peft(tmp_path: Path) -> None:
    def t5() -> nn.Module:
        torch.manual_seed(0)
        sizes = {"d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 1, "num_heads": 2, "vocab_size": 24}
        return T5Model(T5Config(**sizes)).eval()

    ids = {"input_ids": torch.arange(12)[None], "decoder_input_ids": torch.arange(6)[None]}
    config = {"token_indices": TOKENS}
    theirs = trained(peft.get_peft_model(t5(), peft.TrainableTokensConfig(**config)), 1.0)
    theirs.save_pretrained(tmp_path)
    ours = surgery.load(t5(), tmp_path)
    with torch.no_grad():
        assert torch.equal(ours(**ids)[0], theirs(**ids)[0])
    assert {*trainable(theirs)} == {*trainable(surgery.inject(t5(), TrainableTokensConfig(**config)))}
    plain = nn.ModuleDict({"embed_tokens": nn.Embedding(12, 4)})
    surgery.inject(plain, TrainableTokensConfig(**config))
    assert {*trainable(plain)} == {"embed_tokens.trainable_tokens_delta.default"}


def test_a_bias_of_a_head_stays_and_peft_drops_it() -> None:
    def net() -> nn.Module:
        torch.manual_seed(0)
        return nn.ModuleDict({"head": nn.Linear(4, 12)})

    config, x = {"token_indices": TOKENS, "target_modules": ["head"]}, torch.randn(3, 4)
    ours = surgery.inject(net(), TrainableTokensConfig(**config))
    theirs = peft.inject_adapter_in_model(peft.TrainableTokensConfig(**config), net())
    wanted = net()["head"](x)
    bound = 2 * (4 + 4) * torch.finfo(torch.float32).eps * float(wanted.abs().max())
    assert float((ours["head"](x) - wanted).abs().max()) <= bound
    assert float((theirs["head"](x) - wanted).abs().max()) > bound


def test_rows_that_are_drawn_are_normal_numbers() -> None:
    torch.manual_seed(0)
    config = TrainableTokensConfig(token_indices=[*range(24)], init_weights=False)
    drawn = surgery.inject(llama(), config).model.embed_tokens.fitted["default"].params["t"]
    assert abs(float(drawn.mean())) < 5 * (24 * 16) ** -0.5  # five of its standard deviations
    assert abs(float(drawn.var()) - 1) < 5 * (2 / (24 * 16)) ** 0.5


def test_beside_lora_the_order_is_that_of_the_adapters() -> None:
    model = surgery.inject(llama(), surgery.LoraConfig(r=2, target_modules=["embed_tokens"], init_lora_weights=False))
    surgery.inject(model, TrainableTokensConfig(token_indices=[5]), adapter_name="rows")
    embed, own = model.model.embed_tokens, llama().model.embed_tokens.weight
    surgery.set_adapter(model, ["default", "rows"])
    assert torch.equal(embed(torch.arange(24))[5], own[5])
    surgery.set_adapter(model, ["rows", "default"])
    assert not bool((embed(torch.arange(24)) == own).all(-1).any())


def test_the_command_line_inspects_plans_merges_verifies_and_unmerges(tmp_path: Path) -> None:
    model = llama()
    model.save_pretrained(tmp_path / "base")
    by_peft(model, "none").save_pretrained(tmp_path / "adapter")
    base, adapter, out = (str(tmp_path / name) for name in ("base", "adapter", "out"))
    calls = [
        ["inspect", adapter],
        ["plan", base, adapter],
        ["merge", base, adapter, out, "--reversible"],
        ["verify", base, adapter, out],
        ["unmerge", out, str(tmp_path / "back")],
    ]
    for call in calls:
        done = CliRunner().invoke(command, call)
        assert done.exit_code == 0, done.output
    assert (tmp_path / "back" / FILE).read_bytes() == (tmp_path / "base" / FILE).read_bytes()
    refused = CliRunner().invoke(command, ["merge", base, f"{adapter}=0.5", str(tmp_path / "half")])
    assert isinstance(refused.exception, ConfigError)
    told = f"{adapter}: its weight is 0.5; token_indices replaces rows; a weight of 1 is wanted"
    assert str(refused.exception) == told


def test_every_field_that_peft_writes_is_read_and_written_again(tmp_path: Path) -> None:
    peft.TrainableTokensConfig(token_indices=TOKENS).save_pretrained(tmp_path)
    written = json.loads((tmp_path / "adapter_config.json").read_text())
    assert TrainableTokensConfig(token_indices=TOKENS).to_json() == written
    assert TrainableTokensConfig.from_json(written) == TrainableTokensConfig(token_indices=TOKENS)


@pytest.mark.parametrize("value", ["3", 3, None, [1, 1], [-1], [True], [1 << 31], [1.0]], ids=str)
def test_what_are_no_tokens_is_refused(value: object) -> None:
    with pytest.raises(ConfigError, match="token_indices"):
        TrainableTokensConfig(token_indices=value)


@pytest.mark.parametrize(
    ("fields", "error", "words"),
    [
        ({"token_indices": [24]}, MatchError, "token_indices has 24, and it has rows for 24 tokens"),
        ({"token_indices": []}, ConfigError, "token_indices is empty"),
        ({"token_indices": [1], "target_modules": ["embed"]}, MatchError, "nothing matches 'embed'"),
        ({"token_indices": [1], "target_modules": ["norm"]}, MatchError, "norm: a .*RMSNorm"),
        ({"token_indices": [1], "modules_to_save": ["embed_tokens"]}, MatchError, "modules_to_save"),
    ],
)
def test_what_cannot_be_is_refused_and_nothing_changes(
    fields: dict[str, object], error: type[Exception], words: str
) -> None:
    model = llama()
    with pytest.raises(error, match=words):
        surgery.inject(model, TrainableTokensConfig(**fields))
    assert type(model.model.embed_tokens) is nn.Embedding


def test_a_file_of_no_named_module_holds_the_rows_of_one(tmp_path: Path) -> None:
    by_peft(llama(), "both").save_pretrained(tmp_path)
    told = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps(told | {"target_modules": None}))
    with pytest.raises(FormatError, match="is of one embedding, and rows are there of"):
        surgery.load(llama(), tmp_path)
