"""Adapters that peft trained on quantized models of transformers: merged from the files, the same outputs."""

import copy
import json
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    FineGrainedFP8Config,
    GptOssConfig,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen3MoeConfig,
)

import surgery
from surgery.codecs.fp8_block import Fp8Block
from surgery.codecs.mxfp4 import Mxfp4
from surgery.core.codec import Packed

# Rows of whole blocks: the kernel of bitsandbytes for CPUs with AVX512 decodes others wrongly.
SMALL = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 99,
}
SMALL |= {"initializer_range": 0.3}  # else an adapter would do little
FILE = "model.safetensors"
DTYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}


def plain_base(folder: Path, dtype: torch.dtype) -> Path:
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**SMALL)).to(dtype).save_pretrained(folder)
    return folder


def loaded(folder: Path, dtype: torch.dtype, **options: object) -> nn.Module:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, **options).eval()


def trained(model: nn.Module, targets: str | list[str] = "all-linear") -> peft.PeftModel:
    """An adapter over it, after some steps of training."""
    torch.manual_seed(1)
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=4, lora_alpha=16, target_modules=targets))
    optimizer = torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad], lr=0.03)
    tokens = torch.randint(0, 99, (4, 12))
    for _ in range(3):
        adapted(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return adapted.eval()


def outputs(model: nn.Module) -> Tensor:
    """With gradients: without, some CPUs compute in bfloat16 whatever is asked for."""
    model.enable_input_require_grads()
    return model(input_ids=torch.arange(12)[None]).logits.detach().float()


def near(found: Tensor, wanted: Tensor, dtype: torch.dtype) -> bool:
    """Within what two orders of the same roundings may lead apart: per layer some 8 of them, of sums of up to 128
    terms, two layers of 7 linears deep; each counts as an eps of the largest output."""
    return float((found - wanted).abs().max()) <= 2 * 7 * 8 * torch.finfo(dtype).eps * float(wanted.abs().max())


def pre_quantized(folder: Path, dtype: torch.dtype, **settings: object) -> Path:
    """A checkpoint in 4 or 8 bits, as transformers saves it."""
    given = BitsAndBytesConfig(**settings)
    loaded(plain_base(folder / "plain", dtype), dtype, quantization_config=given).save_pretrained(folder / "base")
    return folder / "base"


@pytest.mark.parametrize(("kind", "double_quant"), [("nf4", True), ("fp4", False)], ids=["nf4-double", "fp4"])
@pytest.mark.parametrize("dtype", DTYPES, ids=DTYPES.get)
def test_a_merge_has_the_outputs_of_the_adapter_over_the_4_bit_model(dtype, kind, double_quant, tmp_path: Path):
    settings = {"bnb_4bit_quant_type": kind, "bnb_4bit_use_double_quant": double_quant}
    base = pre_quantized(tmp_path, dtype, load_in_4bit=True, bnb_4bit_compute_dtype=dtype, **settings)
    model = loaded(base, dtype)
    before, adapted = outputs(model), trained(model)
    adapted.save_pretrained(tmp_path / "adapter")
    surgery.merge_checkpoint(base, tmp_path / "adapter", tmp_path / "out")
    merged = loaded(tmp_path / "out", dtype)
    assert {type(one) for name, one in merged.named_modules() if name.endswith("_proj")} == {nn.Linear}
    assert {one.dtype for one in load_file(tmp_path / "out" / FILE).values()} == {dtype}
    found, wanted = outputs(merged), outputs(adapted)
    assert near(found, wanted, dtype)
    assert (before - wanted).abs().max() > 4 * (found - wanted).abs().max()
    assert surgery.verify_checkpoint(base, tmp_path / "adapter", tmp_path / "out").ok


def test_a_merge_into_8_bit_begins_from_what_bitsandbytes_decodes(tmp_path: Path):
    import bitsandbytes.functional as bnb

    base = pre_quantized(tmp_path, torch.bfloat16, load_in_8bit=True)
    adapted = trained(loaded(base, torch.bfloat16), ["q_proj"])
    adapted.save_pretrained(tmp_path / "adapter")
    surgery.merge_checkpoint(base, tmp_path / "adapter", tmp_path / "out")
    before, after = load_file(base / FILE), load_file(tmp_path / "out" / FILE)
    name = "model.layers.1.mlp.up_proj"
    assert torch.equal(after[f"{name}.weight"], decoded_8_bit(bnb, before, name).bfloat16())
    layer = adapted.base_model.model.model.layers[1].self_attn.q_proj
    delta = layer.get_delta_weight("default").double()
    total = decoded_8_bit(bnb, before, "model.layers.1.self_attn.q_proj").bfloat16().double() + delta
    apart = (after["model.layers.1.self_attn.q_proj.weight"].double() - total).abs()
    assert bool(
        (apart <= total.abs() * 2.0**-8 + 1e-6 * delta.abs().max()).all()
    )  # half an ulp, and float32's of delta
    loaded(tmp_path / "out", torch.bfloat16)(torch.arange(12)[None])


def decoded_8_bit(bnb, held: dict[str, Tensor], name: str) -> Tensor:
    return bnb.int8_vectorwise_dequant(held[f"{name}.weight"], held[f"{name}.SCB"])


def test_an_adapter_for_a_16_bit_base_is_merged_into_its_4_bit_form(tmp_path: Path):
    """Names and shapes are the same, and nothing else is asked."""
    plain = plain_base(tmp_path / "given", torch.bfloat16)
    trained(loaded(plain, torch.bfloat16)).save_pretrained(tmp_path / "adapter")
    base = pre_quantized(tmp_path, torch.bfloat16, load_in_4bit=True, bnb_4bit_compute_dtype=torch.bfloat16)
    surgery.merge_checkpoint(base, tmp_path / "adapter", tmp_path / "out")
    quantized = peft.PeftModel.from_pretrained(loaded(base, torch.bfloat16), tmp_path / "adapter").eval()
    assert near(outputs(loaded(tmp_path / "out", torch.bfloat16)), outputs(quantized), torch.bfloat16)


def in_fp8(folder: Path, block: tuple[int, int]) -> None:
    """The linear weights of a checkpoint in fp8, in place, as transformers reads it."""
    tensors = load_file(folder / FILE)
    for name in [name for name in tensors if name.endswith("_proj.weight")]:
        packed = Fp8Block().fresh(tensors[name], {"weight_block_size": block})
        tensors |= {name.removesuffix("weight") + role: one for role, one in packed.tensors.items()}
    save_file(tensors, folder / FILE, {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    quantization = FineGrainedFP8Config(weight_block_size=block).to_dict()
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": quantization}))


def test_an_fp8_model_is_merged_as_transformers_dequantizes_it(tmp_path: Path):
    plain = plain_base(tmp_path / "plain", torch.bfloat16)
    in_fp8(plain, (16, 32))
    model = loaded(plain, torch.bfloat16)
    state = {name: one.clone() for name, one in model.state_dict().items()}
    adapted = trained(model)
    adapted.save_pretrained(tmp_path / "adapter")
    surgery.merge_checkpoint(plain, tmp_path / "adapter", tmp_path / "out")
    merged = loaded(tmp_path / "out", torch.bfloat16)
    assert near(outputs(merged), outputs(adapted), torch.bfloat16)
    zero = copy.deepcopy(load_file(tmp_path / "adapter" / "adapter_model.safetensors"))
    save_file(
        {name: torch.zeros_like(one) for name, one in zero.items()}, tmp_path / "adapter" / "adapter_model.safetensors"
    )
    surgery.merge_checkpoint(plain, tmp_path / "adapter", tmp_path / "none")
    found = loaded(tmp_path / "none", torch.bfloat16).state_dict()
    assert all(torch.equal(found[name], one) for name, one in state.items())


def experts_in_mxfp4(base: Path) -> Path:
    """A small gpt-oss whose experts are in mxfp4, as its files are."""
    sizes = {
        "hidden_size": 64,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "head_dim": 32,
    }
    sizes |= {"num_key_value_heads": 1, "num_local_experts": 2, "num_experts_per_tok": 1, "vocab_size": 99}
    sizes |= {"pad_token_id": 0, "eos_token_id": 1, "initializer_range": 0.3}
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(GptOssConfig(**sizes)).bfloat16().save_pretrained(base)
    tensors = load_file(base / FILE)
    for name in [name for name in tensors if name.endswith(("gate_up_proj", "down_proj"))]:
        packed = Mxfp4().fresh(tensors.pop(name), {})
        tensors |= {f"{name}_{role}": one for role, one in packed.tensors.items()}
    save_file(tensors, base / FILE, {"format": "pt"})
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": "mxfp4"}}))
    return base


def test_the_experts_of_gpt_oss_are_those_that_transformers_dequantizes(tmp_path: Path):
    base = experts_in_mxfp4(tmp_path / "base")
    state = loaded(base, torch.bfloat16).state_dict()
    adapted = trained(loaded(base, torch.bfloat16), ["q_proj"])
    adapted.save_pretrained(tmp_path / "adapter")
    surgery.merge_checkpoint(base, tmp_path / "adapter", tmp_path / "out")
    merged = loaded(tmp_path / "out", torch.bfloat16)
    found = merged.state_dict()
    assert all(torch.equal(found[name], one) for name, one in state.items() if "q_proj.weight" not in name)
    assert near(outputs(merged), outputs(adapted), torch.bfloat16)


def test_a_plain_base_as_nf4_is_what_transformers_quantizes_it_to(tmp_path: Path):
    """QLoRA as most run it: the adapter names the plain base, and was trained over what was made of it on loading."""
    settings = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.bfloat16}
    plain = plain_base(tmp_path / "plain", torch.bfloat16)
    adapted = trained(loaded(plain, torch.bfloat16, quantization_config=BitsAndBytesConfig(**settings)))
    adapted.save_pretrained(tmp_path / "adapter")
    surgery.merge_checkpoint(plain, tmp_path / "adapter", tmp_path / "out", base_as="nf4")
    surgery.merge_checkpoint(plain, tmp_path / "adapter", tmp_path / "other")
    wanted = outputs(adapted)
    found, other = (outputs(loaded(tmp_path / one, torch.bfloat16)) for one in ("out", "other"))
    assert near(found, wanted, torch.bfloat16)
    assert (other - wanted).abs().max() > 2 * (found - wanted).abs().max()


def parameters_trained(model: nn.Module, targets: list[str]) -> peft.PeftModel:
    """An adapter over parameters, as if after training."""
    config = peft.LoraConfig(r=4, lora_alpha=16, target_modules=[], target_parameters=targets)
    adapted = peft.get_peft_model(model, config)
    drawn = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, values in adapted.named_parameters():
            if "lora_B" in name:
                values.copy_(torch.randn(values.shape, generator=drawn) * 0.05)
    return adapted.eval()


def test_adapters_over_the_experts_of_gpt_oss_are_merged_into_mxfp4(tmp_path: Path):
    base = experts_in_mxfp4(tmp_path / "base")
    adapted = parameters_trained(loaded(base, torch.bfloat16), ["experts.gate_up_proj", "experts.down_proj"])
    adapted.save_pretrained(tmp_path / "adapter")
    before = outputs(loaded(base, torch.bfloat16))
    surgery.merge_checkpoint(base, tmp_path / "adapter", tmp_path / "out", reversible=True)
    found, wanted = outputs(loaded(tmp_path / "out", torch.bfloat16)), outputs(adapted)
    assert near(found, wanted, torch.bfloat16)
    assert (before - wanted).abs().max() > 2 * (found - wanted).abs().max()
    assert surgery.verify_checkpoint(base, tmp_path / "adapter", tmp_path / "out").ok
    surgery.unmerge_checkpoint(tmp_path / "out", tmp_path / "back")
    assert (tmp_path / "back" / FILE).read_bytes() == (base / FILE).read_bytes()


def test_experts_keep_mxfp4_by_their_own_scales_and_transformers_decodes_them(tmp_path: Path):
    base, adapter, out = experts_in_mxfp4(tmp_path / "base"), tmp_path / "adapter", tmp_path / "out"
    parameters_trained(loaded(base, torch.bfloat16), ["experts.gate_up_proj", "experts.down_proj"]).save_pretrained(
        adapter
    )
    options = {"into": "keep", "reversible": True, "min_retained": 0.0, "max_noise": 9.0}
    receipt = surgery.merge_checkpoint(base, adapter, out, **options).receipt
    surgery.merge_checkpoint(base, adapter, tmp_path / "exact", dtype="float32")
    before, after, exact = (load_file(one / FILE) for one in (base, out, tmp_path / "exact"))
    state = loaded(out, torch.bfloat16).state_dict()
    for name in ("gate_up_proj", "down_proj"):
        stem = f"model.layers.0.mlp.experts.{name}"
        held = Packed({role: before[f"{stem}_{role}"] for role in ("blocks", "scales")})
        wanted = Mxfp4().encode(exact[stem].double(), like=held)
        assert torch.equal(after[f"{stem}_blocks"], wanted.tensors["blocks"])
        assert torch.equal(after[f"{stem}_scales"], before[f"{stem}_scales"])
        assert not torch.equal(after[f"{stem}_blocks"], before[f"{stem}_blocks"])
        assert torch.equal(state[stem], Mxfp4().decode(wanted, torch.bfloat16))
        assert 0 < receipt["changed"][f"{stem}_blocks"]["retained"] < 2
    assert (out / "config.json").read_bytes() == (base / "config.json").read_bytes()
    assert surgery.verify_checkpoint(base, adapter, out).counts["bits"] == 2
    surgery.unmerge_checkpoint(out, tmp_path / "back")
    assert (tmp_path / "back" / FILE).read_bytes() == (base / FILE).read_bytes()


def test_adapters_over_experts_that_files_hold_one_by_one_are_merged_into_fp8(tmp_path: Path):
    torch.manual_seed(0)
    sizes = SMALL | {"num_key_value_heads": 2, "head_dim": 16, "moe_intermediate_size": 32, "num_experts": 4}
    sizes |= {"num_experts_per_tok": 2}
    base = tmp_path / "base"
    AutoModelForCausalLM.from_config(Qwen3MoeConfig(**sizes)).bfloat16().save_pretrained(base)
    in_fp8(base, (16, 32))
    adapted = parameters_trained(loaded(base, torch.bfloat16), ["experts.gate_up_proj", "experts.down_proj"])
    adapted.save_pretrained(tmp_path / "adapter")
    before = outputs(loaded(base, torch.bfloat16))
    surgery.merge_checkpoint(base, tmp_path / "adapter", tmp_path / "out")
    found, wanted = outputs(loaded(tmp_path / "out", torch.bfloat16)), outputs(adapted)
    assert near(found, wanted, torch.bfloat16)
    assert (before - wanted).abs().max() > 2 * (found - wanted).abs().max()
