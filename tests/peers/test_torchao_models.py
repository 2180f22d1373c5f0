"""Models that torchao has quantized and transformers saved: merged as it decodes them, kept in their format, undone."""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, TorchAoConfig

import surgery
from surgery.codecs import methods
from surgery.codecs.torchao import TorchaoInt8
from surgery.errors import FormatError

torchao = pytest.importorskip("torchao.quantization")

SIZES = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "vocab_size": 32,
}
KINDS = {
    "int8": (torchao.Int8WeightOnlyConfig, {"version": 2}),
    "int8-groups": (torchao.Int8WeightOnlyConfig, {"version": 2, "granularity": torchao.PerGroup(32)}),
    "int8-activations": (torchao.Int8DynamicActivationInt8WeightConfig, {"version": 2}),
    "fp8": (torchao.Float8WeightOnlyConfig, {}),
}
FILE, SITES = "model.safetensors", ("self_attn.q_proj", "mlp.down_proj")
each_kind = pytest.mark.parametrize("kind", KINDS)


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    drawn, folder, tensors = torch.Generator().manual_seed(1), tmp_path / "adapter", {}
    for name, (out, in_) in zip(SITES, ((64, 64), (64, 128)), strict=True):
        stem = f"base_model.model.model.layers.0.{name}"
        tensors[f"{stem}.lora_A.weight"] = torch.randn(4, in_, generator=drawn)
        tensors[f"{stem}.lora_B.weight"] = torch.randn(out, 4, generator=drawn) / 50
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 4, "target_modules": ["q_proj", "down_proj"]}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def quantized(folder: Path, kind: str) -> Path:
    torch.manual_seed(0)
    config = LlamaConfig(**SIZES, dtype=torch.bfloat16, initializer_range=0.1, tie_word_embeddings=False)
    LlamaForCausalLM(config).bfloat16().save_pretrained(folder / "plain")
    made, options = KINDS[kind]
    model = AutoModelForCausalLM.from_pretrained(folder / "plain", quantization_config=TorchAoConfig(made(**options)))
    model.save_pretrained(folder / "base")
    return folder / "base"


def decoded(folder: Path) -> dict[str, Tensor]:
    """By torchao."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    held = {name: one.detach() for name, one in model.state_dict().items()}
    return {name: one if type(one) is Tensor else one.dequantize() for name, one in held.items()}


def plainly(folder: Path, tensors: dict[str, Tensor]) -> Path:
    folder.mkdir()
    save_file({name: one.contiguous() for name, one in tensors.items()}, folder / FILE, {"format": "pt"})
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "dtype": "bfloat16"}))
    return folder


@each_kind
def test_a_merge_is_that_into_what_torchao_decodes_and_is_undone(kind: str, adapter: Path, tmp_path: Path):
    base, out = quantized(tmp_path, kind), tmp_path / "out"
    surgery.merge_checkpoint(base, adapter, out, reversible=True)
    surgery.merge_checkpoint(plainly(tmp_path / "decoded", decoded(base)), adapter, tmp_path / "wanted")
    found, wanted = load_file(out / FILE), load_file(tmp_path / "wanted" / FILE)
    assert found.keys() == wanted.keys()
    assert all(torch.equal(one.view(torch.int16), found[name].view(torch.int16)) for name, one in wanted.items())
    assert "quantization_config" not in json.loads((out / "config.json").read_text())
    with safe_open(out / FILE, "pt") as file:
        assert file.metadata() == {"format": "pt"}
    assert surgery.verify_checkpoint(base, adapter, out).ok
    surgery.unmerge_checkpoint(out, tmp_path / "back")
    assert (tmp_path / "back" / FILE).read_bytes() == (base / FILE).read_bytes()


@each_kind
def test_a_merge_that_keeps_the_format_is_loaded_by_transformers(kind: str, adapter: Path, tmp_path: Path):
    base, out = quantized(tmp_path, kind), tmp_path / "out"
    surgery.merge_checkpoint(base, adapter, out, into="keep", reversible=True)
    assert surgery.verify_checkpoint(base, adapter, out).ok
    before, after = decoded(base), decoded(out)
    factors = load_file(adapter / "adapter_model.safetensors")
    for site in SITES:
        A, B = (factors[f"base_model.model.model.layers.0.{site}.lora_{one}.weight"].double() for one in "AB")
        moved = after[f"model.layers.0.{site}.weight"].double() - before[f"model.layers.0.{site}.weight"].double()
        delta = B @ A
        assert float((moved * delta).sum() / (delta * delta).sum()) > 0.9
        assert float((moved - delta).norm() / delta.norm()) < 0.5
    surgery.unmerge_checkpoint(out, tmp_path / "back")
    assert (tmp_path / "back" / FILE).read_bytes() == (base / FILE).read_bytes()


@each_kind
def test_a_live_model_is_refused_by_name(kind: str, adapter: Path, tmp_path: Path):
    model = AutoModelForCausalLM.from_pretrained(quantized(tmp_path, kind))
    with pytest.raises(surgery.MatchError, match=r"down_proj.*torchao.*merge the checkpoint"):
        surgery.load(model, adapter)


@pytest.mark.parametrize("held", ["act_pre_scale", "per_tensor_scale", "scale_and_zero"])
def test_what_scales_inputs_or_is_packed_otherwise_is_refused(held: str):
    tensors = TorchaoInt8().fresh(torch.ones(4, 8), {}).tensors | {held: torch.ones(1)}
    headers = {role: (one.dtype, tuple(one.shape)) for role, one in tensors.items()}
    with pytest.raises(FormatError, match=held):
        TorchaoInt8().read(headers, {}, tensors.__getitem__)


@pytest.mark.parametrize(
    "told",
    [
        {"default": {"_type": "Int4WeightOnlyConfig", "_data": {}}},
        {"default": {"_type": "Int8DynamicActivationInt8WeightConfig", "_data": {"reduce_range": True}}},
        {"default": {"_type": "FqnToConfig", "_data": {}}},
        "int4_weight_only",
    ],
    ids=["int4", "a smaller range", "several", "as before"],
)
def test_other_kinds_are_refused_by_name(told: object):
    with pytest.raises(FormatError, match=r"torchao's .* is not supported; Int8"):
        methods.refuse_unread({"quant_method": "torchao", "quant_type": told})
