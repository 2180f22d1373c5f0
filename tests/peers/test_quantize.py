"""quantize: any model's linear layers as bitsandbytes', with the codes that it makes itself; and load_model so."""

import sys
from pathlib import Path
from typing import Any

import bitsandbytes
import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM

import surgery
from surgery.codecs import codec_of
from surgery.hosts.quantized import decoded, packed_of_layer

KINDS = ("nf4", "fp4", "int8")
SMALL = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
SMALL |= {"vocab_size": 99, "initializer_range": 0.3}
TOKENS = torch.arange(24).reshape(2, 12)
each_kind = pytest.mark.parametrize("kind", KINDS)
each_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)


def net(dtype: torch.dtype = torch.float32) -> Any:
    torch.manual_seed(0)
    shared = nn.Linear(64, 64)
    model = nn.ModuleDict({"first": nn.Linear(64, 64), "shared": shared, "lm_head": nn.Linear(64, 9, bias=False)})
    model["again"] = shared
    model["norm"] = nn.LayerNorm(64)
    return model.to(dtype)


def settings(kind: str, dtype: torch.dtype, double_quant: bool = False) -> BitsAndBytesConfig:
    if kind == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    told: dict[str, Any] = {"bnb_4bit_quant_type": kind, "bnb_4bit_compute_dtype": dtype}
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_use_double_quant=double_quant, **told)


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model.train()(TOKENS).logits


def same(one: Any, other: Any) -> bool:
    """All tensors, to the byte."""
    mine, theirs = one.state_dict(), other.state_dict()
    return mine.keys() == theirs.keys() and all(torch.equal(mine[name], theirs[name]) for name in mine)


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=str)
def base(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**SMALL)).to(request.param).save_pretrained(tmp_path / "base")
    return tmp_path / "base"


@each_kind
@each_dtype
def test_every_linear_of_any_model_is_bitsandbytes_own_and_the_head_is_not(kind: str, dtype: torch.dtype) -> None:
    model, plain = surgery.quantize(net(dtype), kind), net(dtype)
    wanted = bitsandbytes.nn.Linear8bitLt if kind == "int8" else bitsandbytes.nn.Linear4bit
    assert type(model["first"]) is type(model["shared"]) is wanted
    assert model["again"] is model["shared"]
    assert type(model["lm_head"]) is nn.Linear
    assert model["first"].bias.dtype == dtype
    if kind == "int8":
        codes, scales, _ = bitsandbytes.functional.int8_vectorwise_quant(plain["first"].weight.detach().half())
        assert torch.equal(model["first"].weight, codes)
        assert torch.equal(model["first"].weight.SCB, scales)
    else:
        codes, state = bitsandbytes.functional.quantize_4bit(plain["first"].weight.detach(), quant_type=kind)
        assert torch.equal(model["first"].weight, codes)
        assert torch.equal(model["first"].weight.quant_state.absmax, state.absmax)
        assert model["first"].compute_dtype == dtype
    out = model["first"](torch.randn(3, 64, dtype=dtype))
    assert out.dtype == dtype
    out = model.eval()["lm_head"](model["shared"](out))  # what bitsandbytes alone would repack on some CPUs
    assert bool(torch.isfinite(out).all())
    assert kind == "int8" or not getattr(model["shared"].weight.quant_state, "packing_format_for_cpu", False)


def test_what_is_skipped_stays_and_options_reach_the_layers() -> None:
    model = surgery.quantize(net(), "nf4", skip=["first"], double_quant=True, compute_dtype=torch.bfloat16)
    assert type(model["first"]) is nn.Linear
    assert type(model["lm_head"]) is bitsandbytes.nn.Linear4bit
    assert model["shared"].weight.quant_state.nested
    assert model["shared"].compute_dtype == torch.bfloat16


def tied() -> Any:
    model = net()
    model["first"].weight = model["shared"].weight
    return model


def hooked() -> Any:
    model = net()
    model["shared"].register_forward_hook(lambda *_: None)
    return model


def large() -> Any:
    model = net()
    model["shared"].weight.data[0, 0] = 1e6
    return model


@pytest.mark.parametrize(
    ("model", "options", "error", "told"),
    [
        (net, {"kind": "nf5"}, surgery.UsageError, "'nf5'; one of nf4, fp4, int8"),
        (net, {"kind": "int8", "double_quant": True}, surgery.UsageError, "are of 4 bits"),
        (net, {"kind": "nf4", "skip": ["fisrt"]}, surgery.MatchError, "skip: nothing matches 'fisrt' .*first"),
        (net, {"kind": "nf4", "skip": ["first", "shared", "again", "lm_head"]}, surgery.MatchError, "no nn.Linear"),
        (tied, {"kind": "nf4"}, surgery.MatchError, "first: its weight is tied"),
        (hooked, {"kind": "nf4"}, surgery.StateError, "shared: it has hooks"),
        (large, {"kind": "int8"}, surgery.ValueRangeError, "shared: .* beyond the range of float16"),
        (lambda: net().to("meta"), {"kind": "nf4"}, surgery.StateError, "first: it is on the meta device"),
        (lambda: net().double(), {"kind": "nf4"}, surgery.ValueRangeError, "first: its weight is in float64"),
    ],
)
def test_what_cannot_be_quantized_is_refused_by_name_and_nothing_changes(
    model: Any, options: dict[str, Any], error: type[Exception], told: str
) -> None:
    found = model()
    with pytest.raises(error, match=told):
        surgery.quantize(found, **options)
    assert all(type(module) in (nn.ModuleDict, nn.Linear, nn.LayerNorm) for module in found.modules())


def test_a_model_with_adapters_is_refused() -> None:
    model = surgery.inject(net(), surgery.LoraConfig(target_modules=["first"]))
    with pytest.raises(surgery.StateError, match="quantize it first, or eject"):
        surgery.quantize(model, "nf4")


def test_without_bitsandbytes_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(surgery.EnvironmentFault, match="pip install bitsandbytes"):
        surgery.quantize(net(), "nf4")


@each_kind
def test_a_model_of_transformers_is_as_loaded_so_and_saves_itself_as_a_quantized_checkpoint(
    kind: str, base: Path, tmp_path: Path
) -> None:
    plain = AutoModelForCausalLM.from_pretrained(base)
    model, dtype = surgery.quantize(plain, kind, double_quant=kind != "int8"), plain.dtype
    wanted = AutoModelForCausalLM.from_pretrained(base, quantization_config=settings(kind, dtype, kind != "int8"))
    assert same(model, wanted)
    assert torch.equal(logits(model), logits(wanted))
    model.save_pretrained(tmp_path / "quantized")
    assert torch.equal(logits(surgery.load_model(tmp_path / "quantized")), logits(model))
    surgery.inject(model, surgery.LoraConfig(r=2, target_modules=["q_proj"]))
    model.save_pretrained(tmp_path / "adapter")
    assert torch.equal(
        logits(surgery.load(surgery.load_model(tmp_path / "quantized"), tmp_path / "adapter")), logits(model)
    )


@each_kind
def test_load_model_loads_straight_to_it_with_the_adapter_over_it(kind: str, base: Path, tmp_path: Path) -> None:
    wanted = AutoModelForCausalLM.from_pretrained(base, quantization_config=settings(kind, torch.float32))
    assert same(
        surgery.load_model(base, quantization=kind, dtype=torch.float32),
        AutoModelForCausalLM.from_pretrained(
            base, quantization_config=settings(kind, torch.float32), dtype=torch.float32
        ),
    )
    surgery.inject(wanted, surgery.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    wanted.save_pretrained(tmp_path / "adapter")
    model = surgery.load_model(tmp_path / "adapter", quantization=kind)
    compute = {one.compute_dtype for one in model.modules() if isinstance(one, bitsandbytes.nn.Linear4bit)}
    assert compute <= {AutoModelForCausalLM.from_pretrained(base).dtype}
    assert model.active_adapters() == ["default"]
    if kind == "int8" or compute == {torch.float32}:
        assert torch.equal(logits(model), logits(wanted))


def test_a_checkpoint_that_is_quantized_already_is_not_quantized_again(base: Path, tmp_path: Path) -> None:
    surgery.quantize(AutoModelForCausalLM.from_pretrained(base), "nf4").save_pretrained(tmp_path / "quantized")
    with pytest.raises(surgery.UsageError, match="held quantized already, by bitsandbytes; leave it out"):
        surgery.load_model(tmp_path / "quantized", quantization="int8")
    with pytest.raises(surgery.UsageError, match="held quantized already, by bitsandbytes"):  # and not loaded as nf4
        surgery.load_model(tmp_path / "quantized", quantization=settings("int8", torch.float32))
    with pytest.raises(surgery.UsageError, match="one of nf4, fp4, int8"):
        surgery.load_model(base, quantization="gptq")


METHODS: dict[str, Any] = {
    "lora": surgery.LoraConfig(r=4, lora_alpha=6, target_modules=["0"]),
    "dora": surgery.LoraConfig(r=4, target_modules=["0"], use_dora=True),
    "ia3": surgery.IA3Config(target_modules=["0"], feedforward_modules=[]),
}
each_method = pytest.mark.parametrize("method", METHODS)


def fitted(model: Any, method: str, aware: str | None = None) -> Any:
    """Under an adapter as training would leave it."""
    surgery.inject(model, METHODS[method], quantization_aware=aware)
    torch.manual_seed(1)
    with torch.no_grad():
        for values in model.parameters():
            if values.requires_grad:
                values.add_(torch.randn_like(values) * 0.05)
    return model


def layer(dtype: torch.dtype = torch.float32) -> Any:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(128, 64)).to(dtype)


@each_kind
@each_method
@each_dtype
def test_an_aware_adapter_gives_the_outputs_of_its_merge_quantized_by_bitsandbytes(
    kind: str, method: str, dtype: torch.dtype
) -> None:
    aware = fitted(layer(dtype), method, kind)
    merged = surgery.eject(surgery.merge(fitted(layer(dtype), method)), keep_merged=True)
    quantized = surgery.quantize(merged, kind)
    assert torch.equal(aware[0].weight, decoded(quantized[0]).to(dtype))
    if kind != "int8":  # whose kernels round a scale before it multiplies, or the inputs too
        x = torch.randn(5, 128, dtype=dtype)
        assert torch.equal(aware(x), quantized(x))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("double_quant", [False, True])
@each_method
def test_over_a_base_that_is_held_so_its_own_scales_are_kept(kind: str, double_quant: bool, method: str) -> None:
    if kind == "int8" and double_quant:
        return
    base = surgery.quantize(layer(), kind, double_quant=double_quant)
    packed = packed_of_layer(base[0])
    codec = codec_of(packed, "")
    exact = nn.Sequential(nn.Linear(128, 64).double())
    exact[0].weight.data, exact[0].bias.data = codec.decode(packed, torch.float64), base[0].bias.data.double()
    method_of_base = fitted(base, method, kind)
    exact = fitted(exact, method)
    exact.load_state_dict(
        {
            **exact.state_dict(),
            **{name: values for name, values in method_of_base.state_dict().items() if ".base_layer." not in name},
        }
    )
    merged = surgery.merge(exact)[0].base_layer.weight.detach()
    kept = codec.encode(merged, like=packed)
    assert not torch.equal(kept.tensors["weight"], packed.tensors["weight"])
    assert torch.equal(base[0].weight, codec.decode(kept, torch.float32))


def test_over_a_base_in_another_format_the_scales_are_fresh() -> None:
    base = fitted(surgery.quantize(layer(), "nf4"), "lora", "int8")
    plain = layer()
    plain[0].weight.data = decoded(base[0].base_layer)
    assert torch.equal(base[0].weight, fitted(plain, "lora", "int8")[0].weight)
