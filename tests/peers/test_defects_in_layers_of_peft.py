"""Layers of peft 0.21.2 that compute otherwise than is meant, or are not trained, and what surgery does there."""

import copy
from pathlib import Path
from types import SimpleNamespace

import peft
import pytest
import torch
from made_by_peft import ADAPTER, adapted, llama, lora, outputs, saved
from peft.utils.hotswap import hotswap_adapter
from safetensors.torch import load_file
from torch import nn

import surgery


def test_oft_over_a_convolution_is_not_the_identity_when_fresh_in_peft_and_is_no_method_here() -> None:
    model, x = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1)), torch.randn(2, 4, 6, 6)
    config = peft.OFTConfig(target_modules=["0"], oft_block_size=4)
    assert (adapted(model, config)(x) - model(x)).abs().max() > 0.1
    with pytest.raises(surgery.InputError, match="OFT"):
        surgery.inject(model, config)


def test_randlora_saves_its_shared_bases_again_for_every_layer(tmp_path: Path) -> None:
    saved(tmp_path, peft.RandLoraConfig(r=2, target_modules=["0", "1"]))  # no method here: see test_peft_files
    tensors = load_file(tmp_path / ADAPTER)
    copies = [name for name in tensors if name.endswith("randlora_A")]
    assert len(copies) == 3
    assert all(torch.equal(tensors[name], tensors["base_model.randlora_A"]) for name in copies)


def test_a_method_of_linear_layers_alone_saves_nothing_of_others_in_peft(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 4))
    config = peft.OSFConfig(target_modules=["0"])
    assert not any(values.requires_grad for values in adapted(model, config).parameters())
    saved(tmp_path, config, model)
    assert not load_file(tmp_path / ADAPTER)
    with pytest.raises(surgery.InputError, match="OSF"):
        surgery.inject(model, config)


def test_rows_of_tokens_over_a_linear_layer_drop_its_bias_in_peft() -> None:
    model, x = nn.Sequential(nn.Linear(8, 6)), torch.randn(3, 8)
    theirs = adapted(model, peft.TrainableTokensConfig(target_modules=["0"], token_indices=[1]))
    near = {"rtol": 0.0, "atol": 8 * torch.finfo(torch.float32).eps * 8}  # sums of 8 terms below 4, in another order
    torch.testing.assert_close(theirs(x) + model[0].bias, model(x), **near)
    assert (theirs(x) - model(x)).abs().max() > 0.1


def test_lora_over_a_convolution_with_gaps_raises_in_peft_and_runs_here() -> None:
    model, x = nn.Sequential(nn.Conv2d(4, 4, 3, dilation=2)), torch.randn(2, 4, 8, 8)
    with pytest.raises(RuntimeError, match="size"):
        adapted(model, lora(target_modules=["0"]))(x)
    before = model(x)
    ours = surgery.inject(model, surgery.LoraConfig(r=2, target_modules=["0"]))
    assert torch.equal(ours(x), before)


def test_a_hot_swap_takes_the_alphas_of_each_module_where_peft_does_not(tmp_path: Path) -> None:
    model = llama()
    folder = saved(tmp_path, lora(alpha_pattern={"layers.1.self_attn.q_proj": 24}), model)
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(model), folder)
    before = outputs(theirs)
    hotswap_adapter(theirs, folder, adapter_name="default")  # itself
    assert not torch.allclose(outputs(theirs), before)
    ours = surgery.load(copy.deepcopy(model), folder)
    before = outputs(ours)
    ours.load_adapter(folder, adapter_name="default", hotswap=True)
    assert torch.equal(outputs(ours), before)


@pytest.mark.parametrize("form", ["nf4", "int8"])
def test_a_bias_over_a_quantized_layer_is_merged_scaled_where_that_of_peft_is_not(form: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = surgery.quantize(nn.Sequential(nn.Linear(64, 64)), form)
    model.is_loaded_in_4bit, model.is_loaded_in_8bit = form == "nf4", form == "int8"  # by which peft tells
    before = model[0].bias.clone()
    theirs = adapted(model, lora(target_modules=["0"], lora_alpha=12, lora_bias=True))
    theirs.save_pretrained(tmp_path)
    ours = surgery.load(copy.deepcopy(model), tmp_path)
    theirs.merge_adapter()
    held = theirs.base_model.model[0]
    bias = held.lora_B["default"].bias.detach()
    near = {"rtol": 0.0, "atol": 4 * torch.finfo(torch.float32).eps}  # of numbers below 2
    torch.testing.assert_close(held.base_layer.bias.detach(), before + bias, **near)  # three times it is meant
    ours = surgery.eject(surgery.merge(ours, into="16bit"), keep_merged=True)
    rounded = {"rtol": torch.finfo(torch.bfloat16).eps / 2, "atol": near["atol"]}  # to 16 bits, once
    torch.testing.assert_close(ours[0].bias.detach().float(), before + 3 * bias, **rounded)


def test_a_safe_merge_into_torchao_lets_nan_in_where_ours_refuses_it(tmp_path: Path) -> None:
    torchao = pytest.importorskip("torchao.quantization")
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(64, 64)).bfloat16()
    model = copy.deepcopy(plain)
    torchao.quantize_(model, torchao.Int8WeightOnlyConfig())
    settings = SimpleNamespace(get_apply_tensor_subclass=torchao.Int8WeightOnlyConfig)
    model.hf_quantizer = SimpleNamespace(quantization_config=settings)
    theirs = peft.get_peft_model(model, lora(target_modules=["0"]))
    layer = theirs.base_model.model[0]
    with torch.no_grad():
        layer.lora_B["default"].weight[0] = torch.nan
    theirs.save_pretrained(tmp_path)
    theirs.merge_adapter(safe_merge=True)
    assert not bool(layer.base_layer.weight.dequantize().isfinite().all())
    with pytest.raises(surgery.ValueRangeError):
        surgery.merge(surgery.load(plain, tmp_path))
