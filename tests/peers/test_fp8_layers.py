"""Adapters over the fp8 layers of transformers: every method, merged as their checkpoint is, and taken out again."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, FineGrainedFP8Config, LlamaConfig, LlamaForCausalLM
from transformers.integrations.finegrained_fp8 import FP8Linear, replace_with_fp8_linear
from transformers.quantizers import AutoHfQuantizer

import surgery
from surgery.codecs import packed_of
from surgery.codecs.fp8_block import Fp8Block
from surgery.hosts.quantized import hold, packed_of_layer

SMALL = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 99,
}
SMALL |= {"initializer_range": 0.3, "tie_word_embeddings": False}
TOKENS = torch.arange(24).reshape(2, 12)
BLOCK = (64, 32)
CONFIGS: dict[str, dict[str, Any]] = {
    "lora": {"peft_type": "LORA", "r": 4, "lora_alpha": 8},
    "dora": {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "use_dora": True},
    "ia3": {"peft_type": "IA3", "feedforward_modules": []},
    "ia3 of inputs": {"peft_type": "IA3", "feedforward_modules": ["down_proj"]},
    "adalora": {"peft_type": "ADALORA", "init_r": 4, "target_r": 2, "total_step": 9},
    "miss": {"peft_type": "MISS", "r": 8},
    "loha": {"peft_type": "LOHA", "r": 4},
    "lokr": {"peft_type": "LOKR", "r": 2},
    "shira": {"peft_type": "SHIRA", "r": 8},
}
TARGETS = {"target_modules": ["q_proj", "down_proj"]}
each_config = pytest.mark.parametrize("name", CONFIGS)
FILE = "model.safetensors"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An fp8 checkpoint of whole blocks: others are decoded wrongly by transformers itself."""
    folder = tmp_path_factory.mktemp("fp8")
    torch.manual_seed(0)
    config = LlamaConfig(**SMALL, dtype=torch.bfloat16, architectures=["LlamaForCausalLM"])
    tensors = {}
    for name, values in LlamaForCausalLM(config).bfloat16().state_dict().items():
        if name.endswith("_proj.weight"):
            held = Fp8Block().fresh(values, {"weight_block_size": BLOCK}).tensors
            tensors |= {name.removesuffix("weight") + role: one for role, one in held.items()}
        else:
            tensors[name] = values
    save_file(tensors, folder / FILE, {"format": "pt"})
    told = config.to_dict() | {
        "dtype": "bfloat16",
        "quantization_config": FineGrainedFP8Config(weight_block_size=BLOCK).to_dict(),
    }
    (folder / "config.json").write_text(json.dumps(told))
    return folder


def live(base: Path) -> Any:
    """As transformers loads it beside a GPU."""
    asked = FineGrainedFP8Config(weight_block_size=BLOCK, modules_to_not_convert=["lm_head"])
    quantizer = AutoHfQuantizer.from_config(asked, pre_quantized=True)
    model = LlamaForCausalLM(LlamaConfig.from_pretrained(base)).bfloat16()
    replace_with_fp8_linear(model, modules_to_not_convert=["lm_head"], quantization_config=asked, pre_quantized=True)
    model.load_state_dict(load_file(base / FILE), assign=True)
    model.hf_quantizer, model.is_quantized, model.quantization_method = quantizer, True, "fp8"
    model.config.quantization_config = asked
    return model.eval()


def fitted(model: Any, name: str) -> Any:
    torch.manual_seed(1)
    surgery.inject(model, TARGETS | CONFIGS[name])
    with torch.no_grad():
        for values in model.parameters():
            if values.requires_grad:
                values.add_(torch.randn_like(values) * 0.2)
    return model


def held(module: nn.Module) -> dict[str, bytes]:
    return {name: one.reshape(-1).view(torch.uint8).numpy().tobytes() for name, one in module.state_dict().items()}


def all_equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(
        one[name].dtype == other[name].dtype and torch.equal(one[name], other[name]) for name in one
    )


@each_config
def test_it_runs_and_trains_over_decoded_weights_and_leaves_the_base_as_it_was(name: str, base: Path):
    model = live(base)
    before, layer = held(model), model.model.layers[0].self_attn.q_proj
    assert type(layer) is FP8Linear
    surgery.inject(model, TARGETS | CONFIGS[name])
    out = model(TOKENS).logits
    with surgery.disable_adapters(model):
        assert torch.equal(out, model(TOKENS).logits)
        x = torch.randn(3, 64).bfloat16()
        weight = Fp8Block().decode(packed_of_layer(layer), torch.bfloat16)
        assert torch.equal(model.model.layers[0].self_attn.q_proj(x), F.linear(x, weight))
    model(TOKENS, labels=TOKENS).loss.backward()
    trained = {own: one for own, one in model.named_parameters() if one.requires_grad}
    assert trained
    assert all(one.dtype == torch.float32 and one.grad is not None for one in trained.values())
    surgery.eject(model)
    assert model.model.layers[0].self_attn.q_proj is layer
    assert held(model) == before
    assert not any("forward" in module.__dict__ for module in model.modules())


@each_config
def test_what_runs_is_the_effective_weight_within_rounding(name: str, base: Path):
    layer = fitted(live(base), name).model.layers[0].mlp.down_proj
    x = torch.randn(5, 128)
    weight = layer.weight.detach()
    out, wanted = layer(x).detach(), F.linear(x, weight)
    # Sums of 128 terms and of some more for the factors, each rounded.
    size = F.linear(x.abs(), weight.abs() + layer.decode(layer.base_layer).abs())
    assert bool(((out - wanted).abs() <= 2 * (128 + 8) * torch.finfo(torch.float32).eps * size).all())
    assert float((wanted - F.linear(x, layer.decode(layer.base_layer))).abs().mean()) > 1000 * float(
        (out - wanted).abs().mean()
    )


@each_config
def test_save_merged_writes_the_bytes_of_the_streaming_merge_without_a_word_of_quantization(
    name: str, base: Path, tmp_path: Path
):
    model = fitted(live(base), name)
    before = held(model)
    surgery.save(model, tmp_path / "adapter")
    model.save_merged(tmp_path / "live")
    assert held(model) == before
    surgery.merge_checkpoint(base, tmp_path / "adapter", tmp_path / "files")
    found, wanted = (load_file(tmp_path / one / FILE) for one in ("live", "files"))
    assert all_equal(found, wanted)
    assert "quantization_config" not in json.loads((tmp_path / "live" / "config.json").read_text())
    again, told = AutoModelForCausalLM.from_pretrained(tmp_path / "live", output_loading_info=True)
    assert not any(told.values())
    assert FP8Linear not in map(type, again.modules())
    surgery.load(live(base), tmp_path / "adapter")


@each_config
def test_merged_into_16_bits_and_unmerged_everything_is_as_before(name: str, base: Path):
    model = fitted(live(base), name)
    before, out, plain = held(model), model(TOKENS).logits.detach(), live(base)
    with pytest.raises(surgery.UsageError, match="into"):
        surgery.merge(model)
    surgery.merge(model, into="16bit")
    merged = model(TOKENS).logits.detach()
    for layer in plain.modules():
        hold(layer)
    # Two layers of seven linears, a few roundings each, in the dtype of the model.
    room = 2 * 7 * 8 * torch.finfo(torch.bfloat16).eps * float(out.abs().max())
    assert float((merged - out).abs().max()) <= room
    assert float((plain(TOKENS).logits - out).abs().mean()) > 2 * float((merged - out).abs().mean())
    surgery.unmerge(model)
    assert held(model) == before
    assert torch.equal(model(TOKENS).logits, out)


def test_merged_for_good_the_model_saves_plain_layers_beside_those_in_fp8(base: Path, tmp_path: Path):
    model = fitted(live(base), "lora")
    surgery.save(model, tmp_path / "adapter")
    surgery.merge(model, into="16bit")
    surgery.eject(model, keep_merged=True).save_pretrained(tmp_path / "out")
    surgery.merge_checkpoint(base, tmp_path / "adapter", tmp_path / "wanted")
    found, before, wanted = (load_file(one / FILE) for one in (tmp_path / "out", base, tmp_path / "wanted"))
    for name, one in found.items():
        merged = name.endswith(("q_proj.weight", "down_proj.weight"))
        assert torch.equal(one, wanted[name] if merged else before[name]), name
    told = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert "model.layers.1.mlp.down_proj" in told["modules_to_not_convert"]
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out").state_dict()
    assert all(torch.equal(again[name], one) for name, one in wanted.items())


def test_a_quantization_aware_adapter_runs_what_the_merge_that_keeps_the_format_holds(base: Path, tmp_path: Path):
    model = live(base)
    surgery.inject(model, TARGETS | CONFIGS["lora"], quantization_aware="fp8_block")
    with torch.no_grad():
        for values in model.parameters():
            if values.requires_grad:
                values.add_(torch.randn_like(values) * 0.2)
    surgery.save(model, tmp_path / "adapter")
    surgery.merge_checkpoint(base, tmp_path / "adapter", tmp_path / "out", into="keep")
    layer, tensors = model.model.layers[1].mlp.down_proj, load_file(tmp_path / "out" / FILE)
    held = {role: tensors[f"model.layers.1.mlp.down_proj.{role}"] for role in ("weight", "weight_scale_inv")}
    wanted = Fp8Block().decode(packed_of(held, "a test", {"weight_block_size": BLOCK}), torch.float32)
    assert torch.equal(layer.weight.detach(), wanted)
    assert not torch.equal(wanted, layer.decode(layer.base_layer))


@pytest.mark.parametrize("use", ["lora_bias", "use_dora"])
def test_a_layer_with_a_bias_and_scales_that_are_powers_of_two_is_adapted_too(use: str):
    layer, drawn = FP8Linear(64, 64, (32, 32), scale_fmt="ue8m0", has_bias=True), torch.Generator().manual_seed(0)
    layer.weight.data = torch.randn(64, 64, generator=drawn).to(torch.float8_e4m3fn)
    layer.weight_scale_inv.data = torch.full((2, 2), 124, dtype=torch.uint8).view(layer.weight_scale_inv.dtype)
    layer.bias.data = torch.randn(64, generator=drawn)
    net = nn.Sequential(layer)
    surgery.inject(net, surgery.LoraConfig(r=2, target_modules=["0"], init_lora_weights=False, **{use: True}))
    x, before = torch.randn(3, 64, generator=drawn), held(net)
    out, size = net(x).detach(), F.linear(x.abs(), net[0].weight.detach().abs(), net[0].bias.detach().abs())
    surgery.merge(net, into="16bit")  # bfloat16, in which weights, inputs, the bias and the output are each rounded
    assert bool(((net(x) - out).abs() <= 2 * torch.finfo(torch.bfloat16).eps * size).all())
    surgery.unmerge(net)
    assert held(net) == before
    with surgery.disable_adapters(net):
        assert torch.equal(net(x), F.linear(x, layer.weight.float() / 8, layer.bias))


def test_a_copy_runs_by_its_own_weights(base: Path):
    model = fitted(live(base), "lora")
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.model.layers[0].self_attn.k_proj.weight_scale_inv.mul_(2)
    assert not torch.equal(other(TOKENS).logits, model(TOKENS).logits)


def test_an_fp8_layer_whose_weight_is_no_fp8_is_refused_by_name():
    net = nn.Sequential(FP8Linear(64, 64, BLOCK))
    net[0].weight = nn.Parameter(torch.zeros(64, 64))
    with pytest.raises(surgery.MatchError, match="float32, not in fp8; load the model with dequantize=True"):
        surgery.inject(net, surgery.LoraConfig(r=2, target_modules=["0"]))


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.int8], ids=str)
def test_codes_without_a_layer_that_tells_what_they_mean_are_refused_by_name(dtype: torch.dtype):
    """Such as those of FP8Experts, whose scales are parameters beside them."""
    net = nn.Sequential(nn.Linear(8, 8))
    net[0].weight = nn.Parameter(torch.ones(8, 8).to(dtype), requires_grad=False)
    for fields in ({"target_modules": ["0"]}, {"target_parameters": ["0.weight"]}):
        with pytest.raises(surgery.MatchError, match=f"^0.*{str(dtype).removeprefix('torch.')}.*16 bits or more"):
            surgery.inject(net, surgery.LoraConfig(r=2, **fields))


def test_inspect_counts_what_holds_a_layer_once(base: Path):
    row = next(one for one in surgery.inspect(live(base)).rows if one.name.endswith("0.mlp.down_proj"))
    assert (row.dtype, row.shape, row.size_bytes) == ("fp8_block", (64, 128), 64 * 128 + 4 * 4)


@pytest.mark.parametrize("how", ["save_merged", "eject"])
def test_a_model_that_transformers_has_loaded_on_a_cpu_is_saved_as_it_is(how: str, base: Path, tmp_path: Path):
    """transformers decodes it there, and writes fp8 again with no word of it in config.json: 1000 times too large."""
    model = AutoModelForCausalLM.from_pretrained(base)
    assert FP8Linear not in map(type, model.modules())
    fitted(model, "lora")
    surgery.save(model, tmp_path / "adapter")
    if how == "save_merged":
        model.save_merged(tmp_path / "out")
    else:
        surgery.merge(model)
        surgery.eject(model, keep_merged=True)
        model.save_pretrained(tmp_path / "out")
    surgery.merge_checkpoint(base, tmp_path / "adapter", tmp_path / "wanted")
    assert all_equal(*(load_file(tmp_path / one / FILE) for one in ("out", "wanted")))
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())
