"""`ensure_weight_tying`: copies of tied modules stay tied, beside peft and on files."""

from pathlib import Path

import peft
import pytest
import torch
from checkpoint_folders import file_hashes, read_tensors, tensor_hashes, write_base
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

import surgery
from surgery import LoraConfig, MatchError

SMALL = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "vocab_size": 24, "num_attention_heads": 2}
FIELDS = {"r": 2, "target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}
X = torch.tensor([[1, 5, 3, 0]])


def llama(tied: bool = True) -> nn.Module:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SMALL, tie_word_embeddings=tied)).eval()


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(X).logits


@pytest.fixture
def theirs(tmp_path: Path) -> peft.PeftModel:
    torch.manual_seed(1)
    model = peft.get_peft_model(llama(), peft.LoraConfig(**FIELDS, init_lora_weights=False)).eval()
    with torch.no_grad():
        model.base_model.model.model.embed_tokens.modules_to_save["default"].weight.mul_(1.5)
    model.save_pretrained(tmp_path / "theirs")
    return model


def test_files_go_both_ways_with_the_same_tensors_and_outputs(theirs: peft.PeftModel, tmp_path: Path) -> None:
    ours = surgery.load(llama(), tmp_path / "theirs", trainable=True)
    assert torch.equal(logits(ours), logits(theirs))
    assert ours.lm_head.weight is ours.model.embed_tokens.weight
    surgery.save(ours, tmp_path / "ours")
    found, wanted = (load_file(tmp_path / one / "adapter_model.safetensors") for one in ("ours", "theirs"))
    assert tensor_hashes(found) == tensor_hashes(wanted)
    assert torch.equal(logits(peft.PeftModel.from_pretrained(llama(), tmp_path / "ours").eval()), logits(theirs))


def test_a_fresh_one_is_one_parameter_and_goes_without_a_trace() -> None:
    model = surgery.inject(llama(), LoraConfig(**FIELDS))
    assert torch.equal(logits(model), logits(llama()))
    names = {name for name, values in model.named_parameters() if values.requires_grad and "lora" not in name}
    assert names == {"model.embed_tokens.modules_to_save.default.weight"}
    assert surgery.eject(model).lm_head.weight is model.model.embed_tokens.weight


def test_a_merge_keeps_them_tied_and_is_undone(theirs: peft.PeftModel, tmp_path: Path) -> None:
    state = {name: values for name, values in llama().state_dict().items() if name != "lm_head.weight"}
    config = llama().config.to_dict() | {"architectures": ["LlamaForCausalLM"]}
    base = write_base(tmp_path / "base", state, config=config)
    surgery.merge_checkpoint(base, tmp_path / "theirs", tmp_path / "out", reversible=True)
    assert "lm_head.weight" not in read_tensors(tmp_path / "out")
    merged = LlamaForCausalLM.from_pretrained(tmp_path / "out").eval()
    out = logits(theirs)
    room = 2 * (24 + 4) * torch.finfo(torch.float32).eps * max(1.0, float(out.abs().max()))
    assert float((logits(merged) - out).abs().max()) <= room
    live = surgery.eject(surgery.merge(surgery.load(llama(), tmp_path / "theirs")), keep_merged=True)
    assert tensor_hashes(live.state_dict()) == tensor_hashes(merged.state_dict())
    surgery.unmerge_checkpoint(tmp_path / "out", tmp_path / "back")
    assert file_hashes(tmp_path / "back") == file_hashes(base)


@pytest.mark.usefixtures("theirs")
def test_a_file_of_tied_copies_replaces_both_where_they_are_not_tied(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base", llama(tied=False).state_dict())
    model = surgery.load(llama(tied=False), tmp_path / "theirs")
    surgery.merge_checkpoint(base, tmp_path / "theirs", tmp_path / "out")
    merged = surgery.eject(surgery.merge(model), keep_merged=True)
    assert tensor_hashes(read_tensors(tmp_path / "out")) == tensor_hashes(merged.state_dict())


def test_two_that_are_tied_and_replaced_by_different_ones_are_refused_as_such(tmp_path: Path) -> None:
    config = llama().config.to_dict() | {"architectures": ["LlamaForCausalLM"]}
    state = {name: values for name, values in llama().state_dict().items() if name != "lm_head.weight"}
    base = write_base(tmp_path / "base", state, config=config)
    model = surgery.inject(llama(), LoraConfig(target_modules=["q_proj"], modules_to_save=["embed_tokens", "lm_head"]))
    with torch.no_grad():
        model.lm_head.weight.mul_(2)
    surgery.save(model, tmp_path / "adapter")
    with pytest.raises(MatchError, match=r"tied to model\.embed_tokens\.weight, and the adapters make another tensor"):
        surgery.merge_checkpoint(base, tmp_path / "adapter", tmp_path / "out")
    surgery.merge_checkpoint(base, tmp_path / "adapter", tmp_path / "out", tied="untie")
    found = read_tensors(tmp_path / "out")
    assert torch.equal(found["lm_head.weight"], 2 * found["model.embed_tokens.weight"])


def test_a_combination_keeps_them_tied(theirs: peft.PeftModel, tmp_path: Path) -> None:
    surgery.combine([tmp_path / "theirs"], tmp_path / "combined")
    ours = surgery.load(llama(), tmp_path / "combined", trainable=True)
    assert ours.lm_head.weight is ours.model.embed_tokens.weight
    copy = theirs.base_model.model.model.embed_tokens.modules_to_save["default"].weight
    assert torch.equal(ours.lm_head.weight, copy)


def held_apart(folder: Path, tied: bool) -> Path:
    """A base as older tools write it, with a head that is equal to the embedding."""
    state = {name: values.clone() for name, values in llama().state_dict().items()}
    config = llama(tied).config.to_dict() | {"architectures": ["LlamaForCausalLM"]}
    return write_base(folder, state, config=config)


@pytest.mark.parametrize("target", ["embed_tokens", "lm_head"])
def test_a_head_that_is_held_and_tied_is_no_longer_tied_where_one_of_the_two_changes(
    target: str, tmp_path: Path
) -> None:
    base = held_apart(tmp_path / "base", tied=True)
    adapted = surgery.inject(llama(), LoraConfig(r=2, target_modules=[target], init_lora_weights=False))
    surgery.save(adapted, tmp_path / "adapter")
    surgery.merge_checkpoint(base, tmp_path / "adapter", tmp_path / "out", reversible=True)
    merged = LlamaForCausalLM.from_pretrained(tmp_path / "out").eval()
    assert not merged.config.tie_word_embeddings
    room = 4 * 24 * torch.finfo(torch.float32).eps * float(logits(adapted).abs().max())
    assert float((logits(merged) - logits(adapted)).abs().max()) <= room
    assert surgery.verify_checkpoint(base, tmp_path / "adapter", tmp_path / "out").ok
    surgery.unmerge_checkpoint(tmp_path / "out", tmp_path / "back")
    assert file_hashes(tmp_path / "back") == file_hashes(base)


def test_rows_of_a_head_that_is_held_and_tied_are_refused(tmp_path: Path) -> None:
    base = held_apart(tmp_path / "base", tied=True)
    fields = {"r": 2, "target_modules": ["q_proj"], "trainable_token_indices": [3]}
    surgery.save(surgery.inject(llama(), LoraConfig(**fields)), tmp_path / "adapter")
    with pytest.raises(MatchError, match=r"config\.json ties lm_head\.weight to it, which the files hold apart"):
        surgery.merge_checkpoint(base, tmp_path / "adapter", tmp_path / "out")
    surgery.merge_checkpoint(held_apart(tmp_path / "untied", tied=False), tmp_path / "adapter", tmp_path / "out")


def test_a_second_adapter_has_tied_copies_of_its_own(theirs: peft.PeftModel, tmp_path: Path) -> None:
    model = surgery.inject(llama(), LoraConfig(**FIELDS))
    surgery.inject(model, LoraConfig(**FIELDS), adapter_name="second")
    surgery.load(model, tmp_path / "theirs", adapter_name="third")
    surgery.set_adapter(model, "third")
    assert torch.equal(logits(model), logits(theirs))
    for name in ("default", "second", "third"):
        surgery.set_adapter(model, name)
        assert model.lm_head.weight is model.model.embed_tokens.weight
    assert len({id(model.lm_head.modules_to_save[name].weight) for name in ("default", "second", "third")}) == 3
