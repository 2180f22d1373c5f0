"""Rows of embeddings and heads that LoRA's configs train (`trainable_token_indices`), beside peft and on files."""

from pathlib import Path

import peft
import pytest
import torch
from checkpoint_folders import file_hashes, read_tensors, rewrite, tensor_hashes, write_base
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import GemmaConfig, GemmaForCausalLM, LlamaConfig, LlamaForCausalLM

import surgery
from surgery import ConfigError, FormatError, LoraConfig, MatchError

TENSORS = "adapter_model.safetensors"
SMALL = {
    **{"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "vocab_size": 24, "head_dim": 8},
    **{"num_attention_heads": 2, "num_key_value_heads": 1},
}
TOKENS = {
    "a list": [3, 1, 23],
    "one module": {"embed_tokens": [5]},
    "embedding and head": {"embed_tokens": [3, 1], "lm_head": [0, 2, 23]},
}
each_kind = pytest.mark.parametrize("kind", list(TOKENS))
X = torch.tensor([[1, 5, 3, 0], [23, 23, 2, 1]])


def llama(dtype: torch.dtype = torch.float32, tied: bool = False) -> nn.Module:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SMALL, tie_word_embeddings=tied)).to(dtype).eval()


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(X).logits


def trained(model: nn.Module, kind: object, folder: Path) -> nn.Module:
    """A model of peft whose rows have been trained, saved."""
    tokens = TOKENS[kind] if isinstance(kind, str) else kind
    torch.manual_seed(1)
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], trainable_token_indices=tokens, init_lora_weights=False)
    made = peft.get_peft_model(model, config).eval()
    with torch.no_grad():
        for name, values in made.named_parameters():
            values.add_(torch.randn_like(values) if "trainable_tokens" in name else 0)
    made.save_pretrained(folder)
    return made


def base_of(folder: Path, model: nn.Module) -> Path:
    tied = model.config.tie_word_embeddings
    state = {name: values for name, values in model.state_dict().items() if not tied or name != "lm_head.weight"}
    return write_base(folder, state, config=model.config.to_dict() | {"architectures": [type(model).__name__]})


def same(found: Tensor, wanted: Tensor, kind: str) -> bool:
    """To the bit, but for a head: its rows are multiplied by themselves, 16 terms each, and may be added otherwise."""
    room = 2 * (16 + 4) * torch.finfo(found.dtype).eps * float(wanted.abs().max())
    return float((found - wanted).abs().max()) <= (room if kind == "embedding and head" else 0)


@each_kind
def test_files_go_both_ways_with_the_same_tensors_and_outputs(kind: str, tmp_path: Path) -> None:
    theirs = trained(llama(), kind, tmp_path / "theirs")
    ours = surgery.load(llama(), tmp_path / "theirs")
    assert same(logits(ours), logits(theirs), kind)
    assert not same(logits(ours), logits(llama()), kind)
    surgery.save(ours, tmp_path / "ours")
    found, wanted = (load_file(tmp_path / one / TENSORS) for one in ("ours", "theirs"))
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    assert torch.equal(logits(peft.PeftModel.from_pretrained(llama(), tmp_path / "ours").eval()), logits(theirs))


@each_kind
def test_a_fresh_one_changes_nothing_and_trains_as_in_peft(kind: str) -> None:
    fields = {"r": 2, "target_modules": ["q_proj"], "trainable_token_indices": TOKENS[kind]}
    ours, theirs = (
        surgery.inject(llama(), LoraConfig(**fields)),
        peft.get_peft_model(llama(), peft.LoraConfig(**fields)).eval(),
    )
    assert same(logits(ours), logits(llama()), kind)
    grads = []
    for model in (ours, theirs):
        model(X).logits.square().sum().backward()
        named = ((name, one.grad) for name, one in model.named_parameters() if "trainable_tokens" in name)
        grads.append({name.removeprefix("base_model.model.").replace(".token_adapter", ""): one for name, one in named})
    assert grads[0].keys() == grads[1].keys() != set()
    for name, grad in grads[0].items():
        # Sums of as many terms as there are tokens in the input and logits of each, in another order.
        room = 4 * (8 * 24 + 4) * torch.finfo(torch.float32).eps * float(grads[1][name].abs().max())
        assert float((grad - grads[1][name]).abs().max()) <= room


@each_kind
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_merges_live_and_streaming_agree_and_come_back(kind: str, dtype: torch.dtype, tmp_path: Path) -> None:
    trained(llama(), kind, tmp_path / "adapter")
    base, adapter = base_of(tmp_path / "base", llama(dtype)), tmp_path / "adapter"
    model = surgery.load(llama(dtype), adapter)
    before, out = tensor_hashes(model.state_dict()), logits(model)
    surgery.merge(model)
    # One layer's products, with the delta added before or after: all rows that were replaced are the same bits.
    room = 2 * (24 + 4) * torch.finfo(dtype).eps * max(1.0, float(out.abs().max()))
    assert float((logits(model) - out).abs().max()) <= room
    surgery.unmerge(model)
    assert tensor_hashes(model.state_dict()) == before
    with surgery.disable_adapters(model):
        assert torch.equal(logits(model), logits(llama(dtype)))
    surgery.merge_checkpoint(base, adapter, tmp_path / "out", reversible=True)
    report = surgery.verify_checkpoint(base, adapter, tmp_path / "out")
    assert report.counts["bits"] == 1 + (2 if kind == "embedding and head" else 1)
    merged = surgery.eject(surgery.merge(model), keep_merged=True)
    assert tensor_hashes(read_tensors(tmp_path / "out")) == tensor_hashes(merged.state_dict())
    surgery.unmerge_checkpoint(tmp_path / "out", tmp_path / "back")
    assert file_hashes(tmp_path / "back") == file_hashes(base)
    assert torch.equal(logits(surgery.eject(surgery.load(llama(dtype), adapter))), logits(llama(dtype)))


@each_kind
def test_a_merge_by_peft_passes_verify_and_its_bits_are_known(kind: str, tmp_path: Path) -> None:
    theirs = trained(llama(), kind, tmp_path / "adapter").merge_and_unload()
    base, out = base_of(tmp_path / "base", llama()), base_of(tmp_path / "out", theirs)
    surgery.verify_checkpoint(base, tmp_path / "adapter", out).require()
    surgery.merge_checkpoint(base, tmp_path / "adapter", tmp_path / "as peft", arithmetic="peft")
    assert tensor_hashes(read_tensors(tmp_path / "as peft")) == tensor_hashes(theirs.state_dict())


@pytest.mark.parametrize("tokens", [[3, 1, 23], {"embed_tokens": [3], "lm_head": [3]}], ids=str)
def test_modules_that_are_tied_share_their_rows_as_in_peft(tokens: object, tmp_path: Path) -> None:
    theirs = trained(llama(tied=True), tokens, tmp_path / "adapter")
    base, out = base_of(tmp_path / "base", llama(tied=True)), logits(theirs)
    ours = surgery.load(llama(tied=True), tmp_path / "adapter", trainable=True)
    room = 2 * (24 + 4) * torch.finfo(torch.float32).eps * max(1.0, float(out.abs().max()))
    assert float((logits(ours) - out).abs().max()) <= room
    assert ours.lm_head.fitted["default"].params["t"] is ours.model.embed_tokens.fitted["default"].params["t"]
    surgery.save(ours, tmp_path / "ours")
    found, wanted = (load_file(tmp_path / one / TENSORS) for one in ("ours", "adapter"))
    assert tensor_hashes(found) == tensor_hashes(wanted)
    assert torch.equal(logits(peft.PeftModel.from_pretrained(llama(tied=True), tmp_path / "ours").eval()), out)
    before = tensor_hashes(ours.state_dict())
    surgery.merge(ours)
    assert float((logits(ours) - out).abs().max()) <= room
    surgery.unmerge(ours)
    assert tensor_hashes(ours.state_dict()) == before
    surgery.merge_checkpoint(base, tmp_path / "adapter", tmp_path / "out", reversible=True)
    assert "lm_head.weight" not in read_tensors(tmp_path / "out")
    merged = surgery.eject(surgery.merge(ours), keep_merged=True)
    assert merged.lm_head.weight is merged.model.embed_tokens.weight
    again = LlamaForCausalLM.from_pretrained(tmp_path / "out").eval()
    assert tensor_hashes(again.state_dict()) == tensor_hashes(merged.state_dict())
    assert torch.equal(merged.lm_head.weight, theirs.merge_and_unload().lm_head.weight)
    surgery.unmerge_checkpoint(tmp_path / "out", tmp_path / "back")
    assert file_hashes(tmp_path / "back") == file_hashes(base)


def test_rows_of_tied_weights_that_differ_are_refused_and_so_is_a_merge_of_more_than_rows() -> None:
    fields = {"r": 2, "target_modules": ["q_proj"]}
    with pytest.raises(MatchError, match=r"tied to .*, and the adapter makes something else of it"):
        surgery.inject(
            llama(tied=True), LoraConfig(**fields, trainable_token_indices={"embed_tokens": [3], "lm_head": [2]})
        )
    model = surgery.inject(llama(tied=True), LoraConfig(**fields, trainable_token_indices=[3]))
    surgery.inject(model, LoraConfig(r=2, target_modules=["embed_tokens"]), adapter_name="b")
    surgery.set_adapter(model, ["default", "b"])
    with pytest.raises(MatchError, match="its weight is tied to"):
        surgery.merge(model)


def test_rows_of_a_scaled_embedding_are_scaled_too(tmp_path: Path) -> None:
    def gemma() -> nn.Module:
        torch.manual_seed(0)
        model = GemmaForCausalLM(GemmaConfig(**SMALL, tie_word_embeddings=False))
        return model.eval()

    theirs = trained(gemma(), "a list", tmp_path / "adapter")
    assert torch.equal(logits(surgery.load(gemma(), tmp_path / "adapter")), logits(theirs))


def test_over_another_adapter_the_rows_win() -> None:
    model = surgery.inject(llama(), LoraConfig(r=2, target_modules=["embed_tokens"], init_lora_weights=False))
    config = LoraConfig(r=2, target_modules=["q_proj"], trainable_token_indices=[5])
    surgery.inject(model, config, adapter_name="rows")
    surgery.set_adapter(model, ["default", "rows"])
    embed = model.model.embed_tokens
    own, both = embed.base_layer.weight, embed(torch.arange(24))
    assert torch.equal(both[5], own[5])
    assert not bool((both[:5] == own[:5]).any())
    surgery.merge(model)
    room = 2 * (2 + 4) * torch.finfo(torch.float32).eps * float(both.abs().max())
    assert float((embed(torch.arange(24)) - both).abs().max()) <= room


def test_a_bias_stays_where_rows_of_a_linear_are_replaced_and_peft_drops_it() -> None:
    def net() -> nn.Module:
        torch.manual_seed(0)
        return nn.ModuleDict({"q_proj": nn.Linear(4, 4), "head": nn.Linear(4, 6)})

    fields = {"r": 2, "target_modules": ["q_proj"], "trainable_token_indices": {"head": [1]}}
    x = torch.randn(3, 4)
    ours, theirs = (
        surgery.inject(net(), LoraConfig(**fields)),
        peft.inject_adapter_in_model(peft.LoraConfig(**fields), net()),
    )
    wanted = net()["head"](x)
    room = 2 * (4 + 4) * torch.finfo(torch.float32).eps * float(wanted.abs().max())
    assert float((ours["head"](x) - wanted).abs().max()) <= room
    assert float((theirs["head"](x) - wanted).abs().max()) > room


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"trainable_token_indices": [24]}, "has 24, and it has rows for 24 tokens"),
        ({"trainable_token_indices": {"embed": [1]}}, "nothing matches 'embed'; nearest: .*embed_tokens"),
        ({"trainable_token_indices": {"q_proj": [1]}}, "trainable_token_indices and target_modules both name it"),
        ({"trainable_token_indices": {"norm": [1]}}, "norm: a .*RMSNorm"),
        ({"trainable_token_indices": [1], "modules_to_save": ["embed_tokens"]}, "and modules_to_save both name it"),
    ],
)
def test_what_cannot_be_is_refused_and_nothing_changes(fields: dict[str, object], words: str) -> None:
    model = llama()
    with pytest.raises(MatchError, match=words):
        surgery.inject(model, LoraConfig(r=2, target_modules=["q_proj"], **fields))
    assert type(model.model.embed_tokens) is nn.Embedding


def test_a_model_of_two_embeddings_is_refused() -> None:
    config = LoraConfig(r=2, target_modules=["q_proj"], trainable_token_indices=[1])
    two = nn.ModuleDict({"q_proj": nn.Linear(2, 2), "wte": nn.Embedding(4, 2), "shared": nn.Embedding(4, 2)})
    with pytest.raises(MatchError, match="one embedding of tokens is wanted, and here shared, wte"):
        surgery.inject(two, config)


@pytest.mark.parametrize("value", ["3", 3, [], {"a": []}, {"a": 3}, [1, 1], [-1], [True], [1 << 31], {"": {}}], ids=str)
def test_what_are_no_tokens_is_refused(value: object) -> None:
    with pytest.raises(ConfigError, match="trainable_token_indices"):
        LoraConfig(target_modules=["q_proj"], trainable_token_indices=value)


def test_files_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    trained(llama(), "embedding and head", tmp_path / "adapter")
    base, file = base_of(tmp_path / "base", llama()), tmp_path / "adapter" / TENSORS
    with pytest.raises(ConfigError, match="a weight of 1 is wanted"):
        surgery.merge_checkpoint(base, [(tmp_path / "adapter", 0.5)], tmp_path / "out")
    rewrite(file, {"base_model.model.lm_head.token_adapter.trainable_tokens_delta": None})
    with pytest.raises(FormatError, match="the rows of lm_head are not there"):
        surgery.load(llama(), tmp_path / "adapter")
    trained(llama(tied=True), {"embed_tokens": [3], "lm_head": [3]}, tmp_path / "tied")
    with pytest.raises(MatchError, match="the rows of lm_head are not in it, as PEFT leaves them out"):
        surgery.load(llama(), tmp_path / "tied")
    with pytest.raises(MatchError, match="the rows of lm_head are not in it, as PEFT leaves them out"):
        surgery.merge_checkpoint(base, tmp_path / "tied", tmp_path / "out")
