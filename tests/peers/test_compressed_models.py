"""Models that compressed-tensors has compressed: merged as transformers reads them, kept in their format, undone."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, CompressedTensorsConfig, LlamaConfig, LlamaForCausalLM, Qwen3MoeConfig

import surgery
from surgery.codecs.compressed_ints import PackQuantized

compressed_tensors = pytest.importorskip("compressed_tensors")

SIZES = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "vocab_size": 32,
}
# By name: the dtype of the model, in which scales are then, too.
SCHEMES = {
    "W4A16": torch.bfloat16,
    "W4A16_ASYM": torch.float16,
    "W8A16": torch.float16,
    "W8A8": torch.bfloat16,
    "FP8": torch.bfloat16,
    "FP8_DYNAMIC": torch.bfloat16,
    "FP8_BLOCK": torch.bfloat16,
    "NVFP4A16": torch.bfloat16,
    "NVFP4": torch.bfloat16,
}
FILE = "model.safetensors"


def compressed_model(folder: Path, scheme: str) -> Path:
    """By compressed-tensors, with its scales for the least and the largest weights."""
    from compressed_tensors.compressors import ModelCompressor
    from compressed_tensors.quantization import QuantizationConfig, apply_quantization_config
    from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam, is_module_quantized

    torch.manual_seed(0)
    config = LlamaConfig(**SIZES, dtype=SCHEMES[scheme], initializer_range=0.1, tie_word_embeddings=False)
    model = LlamaForCausalLM(config).to(SCHEMES[scheme])
    apply_quantization_config(model, QuantizationConfig(config_groups={scheme: ["Linear"]}, ignore=["lm_head"]))
    for module in filter(is_module_quantized, model.modules()):
        args, weight = module.quantization_scheme.weights, module.weight.data
        whole = generate_gparam(weight.min(), weight.max()) if args.strategy == "tensor_group" else None
        if whole is not None:
            module.weight_global_scale.data.copy_(whole)
        scale, zero = calculate_qparams(*ends(weight, args), args, whole)
        module.weight_scale.data.copy_(scale)
        if "weight_zero_point" in module._parameters:
            module.weight_zero_point.data.copy_(zero)
        for name in ("input_scale", "input_global_scale"):
            if name in module._parameters:
                module._parameters[name].data.fill_(1.0)
    compressor = ModelCompressor.from_pretrained_model(model)
    compressor.compress_model(model)
    model.save_pretrained(folder)
    compressor.update_config(str(folder))
    return folder


def ends(weight: Tensor, args) -> tuple[Tensor, Tensor]:
    if args.strategy == "block":
        height, width = args.block_structure
        parts = weight.view(len(weight) // height, height, -1, width).transpose(1, 2).flatten(2)
    elif args.strategy in {"group", "tensor_group"}:
        parts = weight.view(len(weight), -1, args.group_size)
    else:
        parts = (weight if args.strategy == "channel" else weight.flatten()).unsqueeze(-2)
    return parts.amin(dim=-1), parts.amax(dim=-1)


def adapter(folder: Path, size: float) -> Path:
    drawn, names = torch.Generator().manual_seed(1), ("self_attn.q_proj", "mlp.down_proj")
    tensors = {}
    for name, (out, in_) in zip(names, ((128, 128), (128, 256)), strict=True):
        stem = f"base_model.model.model.layers.0.{name}"
        tensors[f"{stem}.lora_A.weight"] = torch.randn(4, in_, generator=drawn)
        tensors[f"{stem}.lora_B.weight"] = torch.randn(out, 4, generator=drawn) * size
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 4, "target_modules": ["q_proj", "down_proj"]}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def dequantized(base: Path, folder: Path) -> Path:
    """By transformers, saved plainly."""
    asked = CompressedTensorsConfig(dequantize=True)
    model = AutoModelForCausalLM.from_pretrained(base, quantization_config=asked)
    LlamaForCausalLM.from_pretrained(None, config=model.config, state_dict=model.state_dict()).save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    config.pop("quantization_config", None)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def hashes(folder: Path) -> dict[str, bytes]:
    return {
        name: one.contiguous().view(torch.uint8).numpy().tobytes() for name, one in load_file(folder / FILE).items()
    }


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_merge_is_that_into_what_transformers_dequantizes_and_is_undone(scheme: str, tmp_path: Path):
    base, given = compressed_model(tmp_path / "base", scheme), adapter(tmp_path / "a", 0.02)
    surgery.merge_checkpoint(base, given, tmp_path / "out", reversible=True)
    surgery.merge_checkpoint(dequantized(base, tmp_path / "plain"), given, tmp_path / "wanted")
    assert hashes(tmp_path / "out") == hashes(tmp_path / "wanted")
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())
    assert surgery.verify_checkpoint(base, given, tmp_path / "out").ok
    surgery.unmerge_checkpoint(tmp_path / "out", tmp_path / "back")
    assert (tmp_path / "back" / FILE).read_bytes() == (base / FILE).read_bytes()


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_merge_that_keeps_the_format_is_loaded_by_transformers(scheme: str, tmp_path: Path):
    """Each weight is as near to the exact merge as the neighbours of its value allow."""
    base, given = compressed_model(tmp_path / "base", scheme), adapter(tmp_path / "a", 0.05)
    surgery.merge_checkpoint(base, given, tmp_path / "out", into="keep", reversible=True)
    assert (tmp_path / "out" / "config.json").read_bytes() == (base / "config.json").read_bytes()
    assert surgery.verify_checkpoint(base, given, tmp_path / "out").ok
    kept, before = (
        load_file(dequantized(one, tmp_path / f"{one.name}-plain") / FILE) for one in (tmp_path / "out", base)
    )
    surgery.merge_checkpoint(tmp_path / "base-plain", given, tmp_path / "wanted", dtype="float32")
    wanted = load_file(tmp_path / "wanted" / FILE)
    for name, one in kept.items():
        moved, asked = one.double() - before[name].double(), wanted[name].double() - before[name].double()
        changed = name.endswith(("q_proj.weight", "down_proj.weight"))
        assert bool(moved.any()) == changed, name
        assert not changed or float((moved * asked).sum() / (asked * asked).sum()) > 0.5
    surgery.unmerge_checkpoint(tmp_path / "out", tmp_path / "back")
    assert (tmp_path / "back" / FILE).read_bytes() == (base / FILE).read_bytes()


@pytest.mark.parametrize("scheme", ["W4A16", "FP8_DYNAMIC"])
def test_what_falls_back_to_16_bits_is_loaded_beside_compressed_weights(scheme: str, tmp_path: Path):
    base, given, out = compressed_model(tmp_path / "base", scheme), adapter(tmp_path / "a", 0.05), tmp_path / "out"
    surgery.merge_checkpoint(base, given, tmp_path / "wanted")
    kept = surgery.merge_checkpoint(base, given, tmp_path / "kept", into="keep").receipt
    noise = [one["noise"] for one in kept["changed"].values()]
    bounds = {"min_retained": 0.0, "max_noise": sum(noise) / 2}
    fallen = surgery.merge_checkpoint(base, given, out, into="keep", fallback="16bit", **bounds).receipt["fallback"]
    assert len(fallen) == 1
    found, in_format, plain = (
        load_file(dequantized(one, tmp_path / f"{one.name}-plain") / FILE) for one in (out, tmp_path / "kept", base)
    )
    plain |= load_file(tmp_path / "wanted" / FILE)
    assert all(torch.equal(one, (plain if name in fallen else in_format)[name]) for name, one in found.items())


@pytest.mark.parametrize("scheme", ["W4A16", "W8A8", "FP8_DYNAMIC", "NVFP4A16"])
def test_a_live_model_is_adapted_where_it_is_dequantized_and_refused_by_name_where_it_is_not(
    scheme: str, tmp_path: Path
):
    base, given = compressed_model(tmp_path / "base", scheme), adapter(tmp_path / "a", 0.02)
    compressed = AutoModelForCausalLM.from_pretrained(base)
    for _ in ("compressed", "decompressed as it first runs"):
        with pytest.raises(surgery.MatchError, match=r"down_proj.*compressed-tensors.*dequantize=True"):
            surgery.load(compressed, given)
        compressed(torch.arange(5)[None])
    plain = AutoModelForCausalLM.from_pretrained(base, quantization_config=CompressedTensorsConfig(dequantize=True))
    surgery.load(plain, given).save_merged(tmp_path / "live")
    surgery.merge_checkpoint(base, given, tmp_path / "files")
    assert hashes(tmp_path / "live") == hashes(tmp_path / "files")
    assert "quantization_config" not in json.loads((tmp_path / "live" / "config.json").read_text())


def packed_experts(folder: Path) -> tuple[Path, Path]:
    """A model whose files hold experts one by one, in int4 by groups of 16, and what these decode to."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "head_dim": 16, "vocab_size": 32}
    config = Qwen3MoeConfig(**sizes, moe_intermediate_size=16, num_experts=4, num_key_value_heads=2)
    AutoModelForCausalLM.from_config(config).bfloat16().save_pretrained(folder / "plain")
    tensors, plain = {}, {}
    for name, weight in load_file(folder / "plain" / FILE).items():
        if ".experts." in name:
            packed = PackQuantized().fresh(weight, {"group_size": 16})
            tensors |= {name.removesuffix("weight") + role: one for role, one in packed.tensors.items()}
            plain[name] = PackQuantized().decode(packed, torch.bfloat16)
        else:
            tensors[name] = plain[name] = weight
    (folder / "base").mkdir()
    for part, held in (("base", tensors), ("plain", plain)):
        save_file(held, folder / part / FILE, {"format": "pt"})
    group = {"targets": ["Linear"], "weights": {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 16}}
    told = {"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": {"group_0": group}}
    read = json.loads((folder / "plain" / "config.json").read_text())
    (folder / "base" / "config.json").write_text(json.dumps(read | {"quantization_config": told}))
    return folder / "base", folder / "plain"


def test_adapters_over_experts_are_merged_into_the_packed_tensors_of_each(tmp_path: Path):
    base, plain = packed_experts(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(plain)
    targets = ["experts.gate_up_proj", "experts.down_proj"]
    surgery.inject(model, surgery.LoraConfig(r=2, lora_alpha=2, target_parameters=targets, init_lora_weights=False))
    surgery.save(model, tmp_path / "adapter")
    (tmp_path / "adapter" / "surgery.base.json").unlink()  # it was trained on the decoded base
    surgery.merge_checkpoint(base, tmp_path / "adapter", tmp_path / "out")
    surgery.merge_checkpoint(plain, tmp_path / "adapter", tmp_path / "wanted")
    assert hashes(tmp_path / "out") == hashes(tmp_path / "wanted")
    surgery.merge_checkpoint(base, tmp_path / "adapter", tmp_path / "kept", into="keep", reversible=True)
    before, after = load_file(base / FILE), load_file(tmp_path / "kept" / FILE)
    changed = {name for name, one in before.items() if not torch.equal(one, after[name])}
    assert changed == {name for name in before if name.endswith(".weight_packed")}
    assert surgery.verify_checkpoint(base, tmp_path / "adapter", tmp_path / "kept").ok
    surgery.unmerge_checkpoint(tmp_path / "kept", tmp_path / "back")
    assert (tmp_path / "back" / FILE).read_bytes() == (base / FILE).read_bytes()
