"""verify judges what peft merged, tensor by tensor; transformers loads what was merged here."""

import copy
import json
from collections.abc import Callable
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
)

import surgery

SMALL = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 99}
GPT2 = GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=99, bos_token_id=0, eos_token_id=0)  # its head is tied
MODELS: dict[str, tuple[Callable[[], PreTrainedModel], dict[str, object]]] = {
    "llama": (lambda: LlamaForCausalLM(LlamaConfig(**SMALL)), {"target_modules": "all-linear"}),
    "gpt2": (lambda: GPT2LMHeadModel(GPT2), {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True}),
    "bert": (
        lambda: BertForSequenceClassification(BertConfig(**SMALL, num_labels=3)),
        {"target_modules": ["query", "dense", "word_embeddings"], "task_type": "SEQ_CLS"},
    ),
}
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
GIVEN = [(kind, dtype) for kind in MODELS for dtype in DTYPES]
FILE = "model.safetensors"


class Merge:
    """A base, an adapter, and the folder that peft's merge of both went to."""

    def __init__(self, folder: Path, kind: str, dtype: torch.dtype) -> None:
        self.base, self.adapter, self.out = folder / "base", folder / "adapter", folder / "out"
        torch.manual_seed(0)
        make, options = MODELS[kind]
        self.model = make().to(dtype).eval()
        self.config = peft.LoraConfig(r=4, lora_alpha=6, init_lora_weights=False, **options)
        self.model.save_pretrained(self.base)

    def by_peft(self, *, safe: bool = False, autocast: bool = True) -> None:
        theirs = adapted(self.model, self.config, autocast)
        theirs.save_pretrained(self.adapter)
        theirs.merge_and_unload(safe_merge=safe).save_pretrained(self.out)

    def verify(self) -> surgery.VerifyReport:
        return surgery.verify_checkpoint(self.base, self.adapter, self.out)

    def different(self) -> list[str]:
        return [name for name, one in self.verify().tensors.items() if one.grade == "different"]

    def changed(self) -> set[str]:
        """The weights that the adapter touches, by its own file."""
        ends = ("lora_A.weight", "lora_embedding_A")
        names = [
            name.removeprefix("base_model.model.") for name in load_file(self.adapter / "adapter_model.safetensors")
        ]
        sites = {name.removesuffix(end) + "weight" for name in names for end in ends if name.endswith(end)}
        return sites | {name for name in names if "lora_" not in name}


def adapted(model: nn.Module, config: peft.LoraConfig, autocast: bool = True) -> peft.PeftModel:
    theirs = peft.get_peft_model(copy.deepcopy(model), config, autocast_adapter_dtype=autocast)
    with torch.no_grad():
        for name, values in theirs.named_parameters():
            if "modules_to_save" in name:
                values.add_(torch.randn_like(values))
    return theirs


def loaded(folder: Path, like: PreTrainedModel) -> PreTrainedModel:
    model, told = type(like).from_pretrained(folder, dtype=like.dtype, output_loading_info=True)
    assert not any(told[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    return model.eval()


def outputs(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(torch.arange(12)[None])[0]


@pytest.fixture(params=GIVEN, ids=lambda given: f"{given[0]}-{given[1]}".replace("torch.", ""))
def merge(request: pytest.FixtureRequest, tmp_path: Path) -> Merge:
    return Merge(tmp_path, *request.param)


@pytest.mark.parametrize("safe", [False, True], ids=["merge", "safe_merge"])
@pytest.mark.parametrize("autocast", [False, True], ids=["adapter as the base", "adapter in float32"])
def test_a_merge_by_peft_is_graded_rounding_or_bits_where_it_merged_and_untouched_elsewhere(
    merge: Merge, safe: bool, autocast: bool
) -> None:
    merge.by_peft(safe=safe, autocast=autocast)
    grades = {name: one.grade for name, one in merge.verify().tensors.items()}
    assert grades.keys() == load_file(merge.base / FILE).keys()
    assert {name for name, grade in grades.items() if grade != "untouched"} == merge.changed()
    assert set(grades.values()) <= {"bits", "rounding", "untouched"}
    assert all(grades[name] == "bits" for name in grades if "classifier" in name)  # copied, not computed


def missing(base: Tensor, _: Tensor) -> Tensor:
    return base


def twice(base: Tensor, merged: Tensor) -> Tensor:
    return (merged.double() + (merged.double() - base.double())).to(base.dtype)


def lacking_in_one_row(base: Tensor, merged: Tensor) -> Tensor:
    return torch.cat([base[:1], merged[1:]])


def too_strong(base: Tensor, merged: Tensor) -> Tensor:
    """By a sixteenth, eight times the ulp of bfloat16 at 1."""
    return (merged.double() + (merged.double() - base.double()) / 16).to(base.dtype)


def subtracted(base: Tensor, merged: Tensor) -> Tensor:
    return (base.double() - (merged.double() - base.double())).to(base.dtype)


@pytest.mark.parametrize("damage", [missing, twice, lacking_in_one_row, too_strong, subtracted])
def test_deltas_that_are_wrong_are_different_and_the_only_ones(
    merge: Merge, damage: Callable[[Tensor, Tensor], Tensor]
) -> None:
    merge.by_peft()
    assert merge.different() == []
    base, merged = load_file(merge.base / FILE), load_file(merge.out / FILE)
    names = sorted(merge.changed())[:: max(1, len(merge.changed()) // 3)]  # each is graded by itself
    save_file(merged | {name: damage(base[name], merged[name]).contiguous() for name in names}, merge.out / FILE)
    assert sorted(merge.different()) == names


@pytest.mark.parametrize("merge", [given for given in GIVEN if given[1].itemsize == 2], indirect=True, ids=str)
def test_one_element_four_ulps_off_is_different(merge: Merge) -> None:
    """Half an ulp each for result and delta, which has at most twice the result's: 1.5 for peft and for verify."""
    merge.by_peft()
    base, merged = load_file(merge.base / FILE), load_file(merge.out / FILE)
    for steps in (-4, 4):
        off = {name: one_element_off(base[name], merged[name], steps) for name in merge.changed()}
        save_file(merged | off, merge.out / FILE)
        assert {*merge.different()} == merge.changed()  # each is graded by itself


def one_element_off(base: Tensor, merged: Tensor, steps: int) -> Tensor:
    """That which was changed most, by so many ulps of it or of what it was."""
    values = merged.clone()
    place = (values.float() - base.float()).abs().argmax()
    size = torch.maximum(values.abs(), base.abs()).flatten()[place].float()
    ulp = torch.finfo(values.dtype).eps * 2.0 ** (torch.frexp(size).exponent.item() - 1)
    values.view(-1)[place] = merged.flatten()[place] + steps * ulp
    return values


def test_a_weight_changed_beside_the_adapter_is_different(merge: Merge) -> None:
    merge.by_peft()
    merged = load_file(merge.out / FILE)
    name = min(merged.keys() - merge.changed())
    merged[name].view(torch.uint8).flatten()[0] ^= 1
    save_file(merged, merge.out / FILE)
    assert merge.different() == [name]


def test_two_adapters_merged_by_peft_are_graded_in_their_order(tmp_path: Path) -> None:
    merge = Merge(tmp_path, "llama", torch.float32)
    theirs = adapted(merge.model, merge.config)
    theirs.add_adapter("other", peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    theirs.save_pretrained(merge.adapter)
    theirs.merge_and_unload(adapter_names=["default", "other"]).save_pretrained(merge.out)
    other = merge.adapter / "other"
    both = surgery.verify_checkpoint(merge.base, [merge.adapter, other], merge.out)
    assert both.ok
    assert both.counts["untouched"] < len(both.tensors)
    assert not surgery.verify_checkpoint(merge.base, merge.adapter, merge.out).ok
    assert not surgery.verify_checkpoint(merge.base, [merge.adapter, (other, 0.5)], merge.out).ok


def test_what_is_merged_here_loads_in_transformers_as_the_live_merge_to_the_bit(merge: Merge) -> None:
    adapted(merge.model, merge.config).save_pretrained(merge.adapter)
    surgery.merge_checkpoint(merge.base, merge.adapter, merge.out)
    live = surgery.merge(surgery.load(loaded(merge.base, merge.model), merge.adapter))
    fresh = loaded(merge.out, merge.model)
    assert torch.equal(outputs(fresh), outputs(live))
    assert not torch.equal(outputs(fresh), outputs(merge.model))
    wanted, found = surgery.eject(live, keep_merged=True).state_dict(), fresh.state_dict()
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


def test_the_config_of_the_merged_checkpoint_is_the_bases(merge: Merge) -> None:
    adapted(merge.model, merge.config).save_pretrained(merge.adapter)
    surgery.merge_checkpoint(merge.base, merge.adapter, merge.out)
    assert json.loads((merge.out / "config.json").read_text()) == json.loads((merge.base / "config.json").read_text())


def test_a_tied_head_is_still_tied_after_the_merge(tmp_path: Path) -> None:
    merge = Merge(tmp_path, "gpt2", torch.float32)
    adapted(merge.model, merge.config).save_pretrained(merge.adapter)
    surgery.merge_checkpoint(merge.base, merge.adapter, merge.out)
    assert "lm_head.weight" not in load_file(merge.out / FILE)
    fresh = loaded(merge.out, merge.model)
    assert fresh.lm_head.weight is fresh.transformer.wte.weight
