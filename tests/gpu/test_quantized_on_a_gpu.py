"""bitsandbytes' layers on a GPU, and merges into formats there: the bytes of a CPU, and of the merge on files."""

import copy
from pathlib import Path
from typing import Any

import bitsandbytes
import peft
import pytest
import test_live_merges_into_formats as formats
import test_quantization_aware as aware_laws
import torch
from device import DEVICE, held, here, octets, there
from rational import same_bits
from safetensors.torch import load_file
from test_quantized_layers import CONFIGS, IN, KINDS, TARGETS, given, net, trained
from torch.nn import functional as F

import surgery
from surgery.hosts.quantized import decoded, packed_of_layer

each_kind = pytest.mark.parametrize("kind", KINDS)
each_config = pytest.mark.parametrize("name", CONFIGS)
each_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
FOUR_BITS = [(kind, double) for kind in ("nf4", "fp4") for double in (False, True)]


def base(kind: str, dtype: torch.dtype) -> Any:
    """Quantized on a CPU, and then moved: the codes are the same everywhere."""
    return whole(there(net(kind, dtype)))


def whole(model: Any) -> Any:
    """With the scales of 8 bits where the codes are: bitsandbytes 0.50 leaves them behind where a model is moved."""
    for module in model.modules():
        if isinstance(module, bitsandbytes.nn.Linear8bitLt):
            for holder in (module.weight, module.state):
                if holder.SCB is not None:
                    holder.CB, holder.SCB = module.weight.data, holder.SCB.to(module.weight.device)
    return model


@each_dtype
@pytest.mark.parametrize(("kind", "double_quant"), FOUR_BITS)
def test_four_bits_decode_to_the_bits_of_its_kernel(kind: str, double_quant: bool, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    weight = torch.randn(192, 320).to(dtype)
    codes, state = bitsandbytes.functional.quantize_4bit(
        there(weight), quant_type=kind, compress_statistics=double_quant
    )
    layer = there(
        surgery.quantize(
            torch.nn.Sequential(torch.nn.Linear(320, 192, bias=False)).to(dtype), kind, double_quant=double_quant
        )
    )[0]
    layer.weight.data, layer.weight.quant_state = codes, state
    assert torch.equal(decoded(layer), bitsandbytes.functional.dequantize_4bit(codes, state))  # which has a -0 in fp4


@each_kind
@each_dtype
def test_a_model_there_is_quantized_as_bitsandbytes_does_it_there(kind: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    plain = torch.nn.Sequential(torch.nn.Linear(320, 192)).to(dtype)
    model = surgery.quantize(there(copy.deepcopy(plain)), kind)
    weight = there(plain)[0].weight.detach()
    if kind == "int8":
        codes, scales, _ = bitsandbytes.functional.int8_vectorwise_quant(weight.half())
        assert torch.equal(model[0].weight, codes)
        assert same_bits(decoded(model[0]), bitsandbytes.functional.int8_vectorwise_dequant(codes, scales))
    else:
        codes, state = bitsandbytes.functional.quantize_4bit(weight, quant_type=kind)
        assert torch.equal(model[0].weight, codes)
        assert torch.equal(model[0].weight.quant_state.absmax, state.absmax)
    assert model(there(torch.randn(3, 320, dtype=dtype))).dtype == dtype


@each_kind
@each_config
@each_dtype
def test_a_fresh_adapter_leaves_the_output_equal_and_everything_trains(
    kind: str, name: str, dtype: torch.dtype
) -> None:
    model, x = base(kind, dtype), there(given(dtype))
    surgery.inject(model, TARGETS | CONFIGS[name])
    out = model(x)
    with surgery.disable_adapters(model):
        assert torch.equal(out, model(x))
    trained(model)(x).float().square().sum().backward()
    fitted = [values for values in model.parameters() if values.requires_grad]
    assert all(values.device == x.device and bool(values.grad.any()) for values in fitted)
    if kind != "int8":  # whose kernels round what comes in too
        weight, bias = (one.detach().float() for one in (model[0].weight, model[0].bias))
        apart = (model(x).detach().float() - F.linear(x.float(), weight, bias)).abs()
        size = F.linear(x.abs().float(), weight.abs() + decoded(model[0].base_layer).abs().float(), bias.abs())
        # Sums of IN terms and of some more for the factors, each rounded, and the outcome in the model's dtype.
        assert bool((apart <= 2 * (IN + 8) * torch.finfo(dtype).eps * size).all())


@each_kind
@each_config
@each_dtype
def test_a_merge_into_sixteen_bits_has_the_bytes_of_a_cpu_and_comes_back(
    kind: str, name: str, dtype: torch.dtype
) -> None:
    model = trained(surgery.inject(net(kind, dtype), TARGETS | CONFIGS[name]))
    near, far = copy.deepcopy(model), whole(there(model))
    before = held(far)
    for one in (near, far):
        surgery.merge(one, into="16bit")
    assert octets(far[0].base_layer.weight) == octets(near[0].base_layer.weight)
    assert octets(far[0].base_layer.bias) == octets(near[0].base_layer.bias)
    assert held(surgery.unmerge(far)) == before
    surgery.merge(far, into="16bit")
    assert held(surgery.unmerge(far.cpu())) == held(surgery.unmerge(near))


@pytest.mark.parametrize(("config", "rounding"), [*((one, None) for one in formats.CONFIGS), ("lora", "feedback")])
@pytest.mark.parametrize(("form", "into"), formats.PAIRS)
def test_layers_there_hold_the_bytes_of_the_merge_on_files(
    form: str, into: str, config: str, rounding: str | None, tmp_path: Path
) -> None:
    model = formats.net(form)
    formats.files(model, form, tmp_path / "base")
    surgery.save(formats.fitted(model, config), tmp_path / "adapter")
    options = {"into": into, "rounding": rounding, **formats.ANY}
    surgery.merge_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "out", **options)
    before, model = held(model), whole(there(model))
    surgery.merge(model, **options)
    written = load_file(tmp_path / "out" / "model.safetensors")
    for name in ("q", "up"):
        layer = model.get_submodule(name).base_layer
        assert {values.device.type for values in packed_of_layer(layer).tensors.values()} <= {DEVICE, "cpu"}
        assert layer.weight.device.type == torch.device(DEVICE).type
        found = {f"{name}.{role}": here(one) for role, one in packed_of_layer(layer).tensors.items()}
        assert formats.hashes(found) == formats.hashes({key: written[key] for key in found})
        assert octets(layer.bias) == octets(written[f"{name}.bias"])
    if into != "fp8_block" and form != "fp8_block":  # whose kernels come from the Hub
        assert bool(model(there(formats.TOKENS)).isfinite().all())
    assert held(surgery.unmerge(model).cpu()) == before


@each_kind
def test_a_model_that_was_quantized_here_bears_an_adapter_there(kind: str) -> None:
    model = there(net(kind))
    surgery.inject(model, TARGETS | CONFIGS["lora"])
    assert bool(trained(model)(there(given())).isfinite().all())
    before = held(model)
    merged = surgery.merge(model, into="16bit").cpu()
    assert held(surgery.unmerge(merged)) == before
    assert bool(merged(given()).isfinite().all())


@aware_laws.each_case
@aware_laws.each_format
@aware_laws.each_dtype
def test_an_adapter_aware_of_a_format_is_its_merge_there(config: Any, form: str, dtype: torch.dtype) -> None:
    model = aware_laws.trained(surgery.inject(aware_laws.net(dtype), config, quantization_aware=form))
    with torch.no_grad():
        wanted = copy.deepcopy(model)[0].weight
    x, model = there(aware_laws.given(dtype)), there(model)
    assert same_bits(here(model[0].weight), wanted)
    assert same_bits(model(x).detach(), F.linear(x, model[0].weight, model[0].bias).detach())
    model(x).square().sum().backward()
    assert all(bool(values.grad.any()) for values in model.parameters() if values.requires_grad)


PEFT = {
    "lora": peft.LoraConfig(r=4, lora_alpha=8, target_modules=["0"], init_lora_weights=False),
    "dora": peft.LoraConfig(r=4, lora_alpha=8, target_modules=["0"], use_dora=True, init_lora_weights=False),
    "ia3": peft.IA3Config(target_modules=["0"], feedforward_modules=[], init_ia3_weights=False),
}


@each_kind
@pytest.mark.parametrize("name", PEFT)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_what_peft_trained_there_gives_its_outputs_here(
    kind: str, name: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    if name == "ia3" and dtype != torch.float32:
        return  # where peft raises
    theirs = peft.get_peft_model(base(kind, dtype), copy.deepcopy(PEFT[name]))
    theirs.save_pretrained(tmp_path)
    x = there(given(dtype))
    ours, wanted = surgery.load(base(kind, dtype), tmp_path)(x).float(), theirs(x).float()
    # Some 8 roundings in the dtype, of sums of IN terms and r more; DoRA's norm is one of a sum of IN squares.
    room = 8 * torch.finfo(dtype).eps * float(wanted.detach().abs().max())
    assert float((ours - wanted).abs().max()) <= room
    assert float((base(kind, dtype)(x).float() - wanted).abs().max()) > 4 * room
