"""Merging over quantized layers: plain ones stand in, as a checkpoint is merged, and the very layers come back."""

import copy
import json
from pathlib import Path
from typing import Any

import bitsandbytes
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM

import surgery

SMALL = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
SMALL |= {"vocab_size": 99, "initializer_range": 0.3}
TOKENS = torch.arange(24).reshape(2, 12)
METHODS: dict[str, Any] = {
    "lora": surgery.LoraConfig(r=4, lora_alpha=6, target_modules=["q_proj", "down_proj"]),
    "dora": surgery.LoraConfig(r=4, target_modules=["q_proj", "down_proj"], use_dora=True),
    "ia3": surgery.IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]),
    "adalora": surgery.AdaLoraConfig(init_r=4, target_r=2, total_step=9, target_modules=["q_proj"]),
    "miss": surgery.MissConfig(r=8, target_modules=["q_proj", "down_proj"]),
    "loha": surgery.LoHaConfig(r=4, target_modules=["q_proj", "down_proj"]),
    "lokr": surgery.LoKrConfig(r=2, target_modules=["q_proj", "down_proj"]),
    "shira": surgery.ShiraConfig(r=8, target_modules=["q_proj", "down_proj"]),
    "supertuning": surgery.SupertuningConfig(r=4, target_modules=["q_proj", "down_proj"]),
    "c3a": surgery.C3AConfig(block_size=32, target_modules=["q_proj", "down_proj"]),
    "vblora": surgery.VBLoRAConfig(r=4, num_vectors=9, vector_length=16, target_modules=["q_proj", "down_proj"]),
    "unilora": surgery.UniLoraConfig(r=4, save_indices=True, target_modules=["q_proj", "down_proj"]),
    "tinylora": surgery.TinyLoraConfig(u=5, target_modules=["q_proj", "down_proj"]),
    "fourierft": surgery.FourierFTConfig(n_frequency=300, target_modules=["q_proj", "down_proj"]),
    "waveft": surgery.WaveFTConfig(n_frequency=300, target_modules=["q_proj", "down_proj"]),
    "hira": surgery.HiraConfig(r=4, target_modules=["q_proj", "down_proj"]),
    "delora": surgery.DeloraConfig(r=4, target_modules=["q_proj", "down_proj"]),
    "gralora": surgery.GraloraConfig(r=4, target_modules=["q_proj", "down_proj"]),
    "glora": surgery.GloraConfig(r=4, target_modules=["q_proj", "down_proj"]),
}
# By name: the kind, the dtype of the model, and that of what 4 bits compute in.
BASES = {
    "nf4": ("nf4", torch.bfloat16, torch.bfloat16),
    "computed wider": ("nf4", torch.bfloat16, torch.float32),
    "computed otherwise": ("fp4", torch.bfloat16, torch.float16),
    "float32": ("nf4", torch.float32, torch.float32),
    "int8": ("int8", torch.bfloat16, None),
}
PAIRS = [*((case, "dora") for case in BASES), *(("nf4", method) for method in METHODS if method != "dora")]
each_pair = pytest.mark.parametrize(("case", "method"), PAIRS)


@pytest.fixture
def plain(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**SMALL)).save_pretrained(tmp_path / "plain")
    return tmp_path / "plain"


def loaded(plain: Path, case: str) -> Any:
    kind, dtype, computed = BASES[case]
    told: dict[str, Any] = {"load_in_8bit": True}
    if kind != "int8":
        told = {"load_in_4bit": True, "bnb_4bit_quant_type": kind, "bnb_4bit_compute_dtype": computed}
    settings = BitsAndBytesConfig(**told)
    return AutoModelForCausalLM.from_pretrained(plain, quantization_config=settings, dtype=dtype)


def fitted(model: Any, method: str) -> Any:
    torch.manual_seed(1)
    surgery.inject(model, METHODS[method])
    with torch.no_grad():
        for values in model.parameters():
            if values.requires_grad:
                values.add_(torch.randn_like(values) * 0.05)
    return model


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model.train()(TOKENS).logits.float()


def held(model: nn.Module) -> dict[str, Tensor]:
    return {name: values.clone() for name, values in model.state_dict().items()}


def all_equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    same = all(one[name].dtype == other[name].dtype and torch.equal(one[name], other[name]) for name in one)
    return one.keys() == other.keys() and same


@each_pair
def test_save_merged_writes_the_bytes_of_the_streaming_merge_without_a_word_of_quantization(
    case: str, method: str, plain: Path, tmp_path: Path
) -> None:
    model = loaded(plain, case)
    model.save_pretrained(tmp_path / "base")
    fitted(model, method).save_pretrained(tmp_path / "adapter")
    before = held(model)
    model.save_merged(tmp_path / "live")
    assert all_equal(held(model), before)
    surgery.merge_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "files")
    live, files = (load_file(tmp_path / one / "model.safetensors") for one in ("live", "files"))
    assert all_equal(live, files)
    for one in ("live", "files"):
        assert "quantization_config" not in json.loads((tmp_path / one / "config.json").read_text())
    again, told = AutoModelForCausalLM.from_pretrained(tmp_path / "live", output_loading_info=True)
    assert not any(told.values())
    assert {type(module) for module in again.modules() if isinstance(module, nn.Linear)} == {nn.Linear}
    # The stand-ins round each merged weight once more than the adapter does, and each output with it: two layers of
    # seven linears, a few roundings each, in the dtype of the model.
    room = 2 * 7 * 8 * torch.finfo(BASES[case][1]).eps * float(logits(model).abs().max())
    assert float((logits(again) - logits(model)).abs().max()) <= room


def test_layers_under_adapters_that_do_not_run_are_written_plainly_too(plain: Path, tmp_path: Path) -> None:
    model = fitted(loaded(plain, "nf4"), "lora")
    model.save_merged(tmp_path / "wanted")
    surgery.inject(model, METHODS["ia3"], adapter_name="idle")
    model.save_merged(tmp_path / "found")
    found, wanted = (load_file(tmp_path / one / "model.safetensors") for one in ("found", "wanted"))
    assert all_equal(found, wanted)


def test_a_checkpoint_that_was_quantized_already_is_written_merged_too(plain: Path, tmp_path: Path) -> None:
    loaded(plain, "nf4").save_pretrained(tmp_path / "base")
    model = fitted(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), "lora")
    model.save_merged(tmp_path / "merged")
    fitted(loaded(plain, "nf4"), "lora").save_merged(tmp_path / "wanted")
    found, wanted = (load_file(tmp_path / one / "model.safetensors") for one in ("merged", "wanted"))
    assert all_equal(found, wanted)
    assert model.config.quantization_config.load_in_4bit
    with torch.no_grad():
        model.eval()(TOKENS)


@each_pair
@pytest.mark.parametrize("undo", ["index", "copy"])
def test_a_merge_into_16_bits_runs_and_comes_back_to_the_very_layers(
    case: str, method: str, undo: Any, plain: Path
) -> None:
    model = fitted(loaded(plain, case), method)
    kept, before, running = dict(model.named_modules()), held(model), logits(model)
    model.merge_adapter(undo=undo, into="16bit")
    assert not torch.equal(logits(model), running)
    model.unmerge_adapter()
    assert dict(model.named_modules()) == kept
    assert all_equal(held(model), before)
    assert torch.equal(logits(model), running)


def test_what_is_merged_for_good_says_which_layers_are_plain(plain: Path, tmp_path: Path) -> None:
    model = fitted(loaded(plain, "nf4"), "lora")
    surgery.eject(surgery.merge(model, into="16bit"), keep_merged=True)
    attention = model.model.layers[0].self_attn
    assert type(attention.q_proj) is nn.Linear
    assert type(attention.k_proj) is bitsandbytes.nn.Linear4bit
    model.save_pretrained(tmp_path / "half")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "half")
    assert torch.equal(logits(again), logits(model))
    every = surgery.inject(model, surgery.LoraConfig(r=2, target_modules="all-linear"))
    surgery.eject(surgery.merge(every, into="16bit"), keep_merged=True)
    model.save_pretrained(tmp_path / "whole")
    assert "quantization_config" not in json.loads((tmp_path / "whole" / "config.json").read_text())
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "whole")), logits(model))


def test_an_adapter_saved_while_it_is_merged_tells_of_the_quantized_base(plain: Path, tmp_path: Path) -> None:
    model = fitted(loaded(plain, "nf4"), "lora")
    surgery.save(model, tmp_path / "before")
    surgery.save(surgery.merge(model, into="16bit"), tmp_path / "meanwhile")
    told = [(tmp_path / one / "surgery.base.json").read_bytes() for one in ("before", "meanwhile")]
    assert told[0] == told[1]


def test_a_failing_merge_leaves_everything_as_it_was(plain: Path) -> None:
    model = fitted(loaded(plain, "nf4"), "lora")
    kept, before = dict(model.named_modules()), held(model)
    broken = model.model.layers[1].mlp.down_proj.lora_A.default.weight
    good = copy.deepcopy(broken.data)
    broken.data[0, 0] = torch.inf
    with pytest.raises(surgery.ValueRangeError, match=r"layers\.1\.mlp\.down_proj"):
        surgery.merge(model, into="16bit")
    broken.data = good
    assert dict(model.named_modules()) == kept
    assert all_equal(held(model), before)


def test_without_a_word_of_what_becomes_of_quantized_weights_it_is_refused(plain: Path) -> None:
    model = fitted(loaded(plain, "nf4"), "lora")
    with pytest.raises(surgery.UsageError, match=r"q_proj: its weight is quantized.*into=\"16bit\""):
        surgery.merge(model)
    with pytest.raises(surgery.UsageError, match="`into` is '8bit'; one of 16bit, keep, nf4"):
        surgery.merge(model, into="8bit")
    with pytest.raises(surgery.UsageError, match="q_proj: its weight is quantized, where arithmetic 'peft'"):
        surgery.merge(model, into="16bit", arithmetic="peft")
    floats = fitted(AutoModelForCausalLM.from_pretrained(plain), "lora")
    with pytest.raises(surgery.UsageError, match="no adapted weight is quantized; leave it out"):
        surgery.merge(floats, into="16bit")
