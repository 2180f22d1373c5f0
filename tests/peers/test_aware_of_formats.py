"""An adapter aware of a format, merged into it, as the library of the format loads and decodes it: to the bit."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, CompressedTensorsConfig, LlamaConfig, LlamaForCausalLM, TorchAoConfig

import surgery

torchao = pytest.importorskip("torchao.quantization")
pytest.importorskip("compressed_tensors")

SIZES = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 32,
}
ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
# By how transformers runs what it has loaded: on inputs as they come, or on such as are quantized themselves.
AS_THEY_COME, QUANTIZED = ("w4a16", "w8a16", "nvfp4", "mxfp4a16"), ("w8a8", "fp8_dynamic")
FILE, ANY = "model.safetensors", {"min_retained": 0.0, "max_noise": 99.0}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    config = LlamaConfig(**SIZES, dtype=torch.bfloat16, initializer_range=0.1, tie_word_embeddings=False)
    LlamaForCausalLM(config).bfloat16().save_pretrained(tmp_path_factory.mktemp("aware") / "base")
    return tmp_path_factory.getbasetemp() / "aware0" / "base"


def aware_of(form: str, base: Path) -> Any:
    """Over every linear layer that the format would hold."""
    model = AutoModelForCausalLM.from_pretrained(base)
    config = surgery.LoraConfig(r=4, lora_alpha=4, target_modules=ALL, init_lora_weights=False)
    torch.manual_seed(1)
    return surgery.inject(model, config, quantization_aware=form)


def outputs(model: Any) -> Tensor:
    with torch.no_grad():
        return model(torch.arange(6)[None]).logits


@pytest.mark.parametrize("form", AS_THEY_COME + QUANTIZED)
def test_it_runs_to_the_bit_as_what_transformers_decodes_of_its_merge(form: str, base: Path, tmp_path: Path) -> None:
    aware = aware_of(form, base)
    surgery.save(aware, tmp_path / "adapter")
    surgery.merge_checkpoint(base, tmp_path / "adapter", tmp_path / "out", into=form, **ANY)
    wanted = outputs(aware)
    asked = CompressedTensorsConfig(dequantize=True)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", quantization_config=asked)
    held = dict(model.named_modules())
    layers = [name for name in held if name.endswith(tuple(ALL))]
    assert len(layers) == 14
    assert all(torch.equal(held[name].weight, aware.get_submodule(name).weight) for name in layers)
    assert torch.equal(outputs(model), wanted)
    loaded = outputs(AutoModelForCausalLM.from_pretrained(tmp_path / "out"))
    assert torch.equal(loaded, wanted) is (form in AS_THEY_COME)
    assert not torch.equal(outputs(AutoModelForCausalLM.from_pretrained(base)), wanted)
    told = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert told["ignore"] == ["lm_head"]


TORCHAO = {"torchao-int8": torchao.Int8WeightOnlyConfig(), "torchao-fp8": torchao.Float8WeightOnlyConfig()}


@pytest.mark.parametrize("shard", [None, 120_000])
@pytest.mark.parametrize("form", TORCHAO)
def test_it_runs_to_the_bit_as_what_torchao_decodes_of_its_merge(
    form: str, shard: int | None, base: Path, tmp_path: Path
) -> None:
    """All that torchao would hold, with the codes and scales that it makes of the merge in 16 bits."""
    aware = aware_of(form, base)
    surgery.save(aware, tmp_path / "adapter")
    options = {"max_shard_size": shard, "reversible": True, **ANY}
    surgery.merge_checkpoint(base, tmp_path / "adapter", tmp_path / "out", into=form, **options)
    assert len(list((tmp_path / "out").glob("*.safetensors"))) == (1 if shard is None else 4)
    surgery.merge_checkpoint(base, tmp_path / "adapter", tmp_path / "16bit")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    made = AutoModelForCausalLM.from_pretrained(tmp_path / "16bit", quantization_config=TorchAoConfig(TORCHAO[form]))
    wanted = outputs(aware)
    assert torch.equal(outputs(model), outputs(made))
    for name, module in model.named_modules():
        if name.endswith(tuple(ALL)):
            theirs = made.get_submodule(name).weight
            assert type(module.weight) is type(theirs)
            assert all(torch.equal(getattr(module.weight, role), getattr(theirs, role)) for role in ("qdata", "scale"))
            module.weight = torch.nn.Parameter(module.weight.dequantize(), requires_grad=False)
            assert torch.equal(module.weight, aware.get_submodule(name).weight)
    assert torch.equal(outputs(model), wanted)
    assert surgery.verify_checkpoint(base, tmp_path / "adapter", tmp_path / "out").counts["bits"] == 14
    surgery.unmerge_checkpoint(tmp_path / "out", tmp_path / "back")
    assert (tmp_path / "back" / FILE).read_bytes() == (base / FILE).read_bytes()
