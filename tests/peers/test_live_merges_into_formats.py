"""Live merges into a format: the bytes of the merge on files, in the layers of the libraries, and back to the bit."""

import copy
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.functional import linear
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from transformers.integrations.finegrained_fp8 import FP8Linear

import surgery
from surgery import CheckError, MatchError, UsageError
from surgery.codecs import FORMS, codec_of
from surgery.hosts.quantized import compute_dtype, is_quantized, layer_of, packed_of_layer
from surgery.io.octets import sha256_of
from surgery.procedures.planning.treatment import LIVE_FORMS

ANY: dict[str, Any] = {"min_retained": 0.0, "max_noise": math.inf}
KINDS = {"Linear4bit", "Linear8bitLt", "FP8Linear"}
TARGETS = ["q", "up"]
CONFIGS = {
    "lora": surgery.LoraConfig(r=4, lora_alpha=12, target_modules=TARGETS),
    "dora": surgery.LoraConfig(r=4, lora_alpha=12, target_modules=TARGETS, use_dora=True),
    "biased": surgery.LoraConfig(r=4, lora_alpha=12, target_modules=TARGETS, lora_bias=True),
}
BITSANDBYTES = {"quant_method": "bitsandbytes", "bnb_4bit_compute_dtype": "bfloat16"}
QUANTIZED = {**dict.fromkeys(("nf4", "nf4-double", "int8"), BITSANDBYTES), "fp8_block": {"quant_method": "fp8"}}
PAIRS = [
    *(("plain", into) for into in LIVE_FORMS),
    *((base, "keep") for base in QUANTIZED),
    *(("int8", "nf4"), ("nf4", "fp8_block"), ("fp8_block", "int8")),
]


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.emb, self.q = nn.Embedding(11, 192), nn.Linear(192, 130)
        self.up, self.lm_head = nn.Linear(130, 64), nn.Linear(64, 11, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        out: Tensor = self.lm_head(self.up(self.q(self.emb(tokens))))
        return out


TOKENS = torch.arange(11)


def net(base: str) -> Net:
    torch.manual_seed(0)
    model = Net().bfloat16()
    if base == "plain":
        return model
    if base != "fp8_block":
        return surgery.quantize(model, base.removesuffix("-double"), double_quant=base.endswith("-double"))
    for name in ("q", "up"):
        plain = model.get_submodule(name)
        packed = FORMS[base][0].fresh(plain.weight.detach(), {})
        setattr(model, name, layer_of(packed, plain, torch.bfloat16))
    return model


def files(model: nn.Module, base: str, folder: Path) -> Path:
    folder.mkdir()
    save_file({k: v.contiguous() for k, v in model.state_dict().items()}, folder / "model.safetensors")
    told = {"dtype": "bfloat16"} | ({"quantization_config": QUANTIZED[base]} if base in QUANTIZED else {})
    (folder / "config.json").write_text(json.dumps(told))
    return folder


def fitted(model: Net, config: str = "lora", size: float = 0.05) -> Net:
    torch.manual_seed(1)
    surgery.inject(model, CONFIGS[config])
    with torch.no_grad():
        for values in model.parameters():
            if values.requires_grad:
                values.add_(torch.randn_like(values) * size)
    return model


def hashes(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    return {
        name: str(state_of(values)) if ".quant_state." in name else f"{values.dtype} {sha256_of(values)}"
        for name, values in tensors.items()
    }


def state_of(values: Tensor) -> Any:
    """A quant state in JSON, which files pad with spaces, and bitsandbytes spells anew."""
    return json.loads(bytes(values.tolist()))


@pytest.mark.parametrize(("config", "rounding"), [*((one, None) for one in CONFIGS), ("lora", "feedback")])
@pytest.mark.parametrize(("base", "into"), PAIRS)
def test_its_layers_hold_the_bytes_of_the_merge_on_files(
    base: str, into: str, config: str, rounding: str | None, tmp_path: Path
) -> None:
    model = net(base)
    files(model, base, tmp_path / "base")
    surgery.save(fitted(model, config), tmp_path / "adapter")
    options = {"into": into, "rounding": rounding, **ANY}
    surgery.merge_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "out", **options)
    surgery.eject(surgery.merge(model, **options), keep_merged=True)
    assert {type(one).__name__ for one in (model.q, model.up)} <= KINDS
    assert type(model.lm_head) is nn.Linear
    found = {"emb.weight": model.emb.weight, "lm_head.weight": model.lm_head.weight}
    for name in ("q", "up"):
        layer = model.get_submodule(name)
        found |= {f"{name}.{role}": one for role, one in packed_of_layer(layer).tensors.items()}
        found[f"{name}.bias"] = layer.bias
    written = load_file(tmp_path / "out" / "model.safetensors").items()
    assert hashes(found) == hashes({name: one for name, one in written if not name.endswith("weight_format")})


@pytest.mark.parametrize(("base", "into"), PAIRS)
def test_it_runs_as_what_it_decodes_to_and_an_unmerge_puts_the_very_layers_back(base: str, into: str) -> None:
    model = fitted(net(base)).train()
    modules, before = dict(model.named_modules()), hashes(model.state_dict())
    surgery.merge(model, into=into, **ANY)
    plain = copy.deepcopy(model)
    with torch.no_grad():
        found = model(TOKENS)
        x = plain.emb(TOKENS)
        for layer in (plain.q.base_layer, plain.up.base_layer):
            packed = packed_of_layer(layer)
            weight = codec_of(packed, "").decode(packed, torch.bfloat16)
            x, alone = linear(x, weight, layer.bias), layer(x)
            # int8's kernels round their input to 127 steps; the others' sum in another order.
            room = (1 / 127 if into == "int8" or base == into == "int8" else 2**-7) * weight.shape[1]
            assert float((alone - x).abs().max()) <= room * float(x.abs().max())
    assert found.dtype == torch.bfloat16
    surgery.unmerge(model)
    assert dict(model.named_modules()) == modules
    assert hashes(model.state_dict()) == before
    assert is_quantized(model.q.base_layer) is (base != "plain")


def test_a_merge_that_leaves_too_little_fails_and_everything_is_as_it_was() -> None:
    for base, into in (("plain", "nf4"), ("nf4", "keep"), ("int8", "nf4")):
        model = fitted(net(base), size=0.002)
        modules, before = dict(model.named_modules()), hashes(model.state_dict())
        with pytest.raises(CheckError, match=rf"merge into {into}: retained .* least is left at .*into=16bit"):
            surgery.merge(model, into=into)
        assert dict(model.named_modules()) == modules
        assert hashes(model.state_dict()) == before
        surgery.merge(model, into=into, **ANY)


def test_it_computes_in_what_the_base_does() -> None:
    for base, into in (("plain", "nf4"), ("nf4", "keep"), ("nf4-double", "keep")):
        model = surgery.merge(fitted(net(base)), into=into, **ANY)
        assert compute_dtype(model.q.base_layer) == torch.bfloat16


@pytest.mark.parametrize(("base", "into"), [("plain", "nf4"), ("nf4", "16bit"), ("nf4", "keep"), ("int8", "nf4")])
def test_hooks_of_a_layer_are_of_the_one_in_its_place_until_they_are_removed(base: str, into: str) -> None:
    model, runs = net(base), []
    handle = model.q.register_forward_hook(lambda module, _, out: runs.append(type(module).__name__) or 0 * out)
    fitted(model)
    surgery.merge(model, into=into, **({} if into == "16bit" else ANY))
    assert torch.equal(model(TOKENS), model.lm_head(model.up(torch.zeros(1, 130).bfloat16())).expand(11, 11))
    handle.remove()
    model(TOKENS)
    assert runs == ["Linear" if into == "16bit" else "Linear4bit"]
    surgery.unmerge(model)
    assert not model.q.base_layer._forward_hooks


@pytest.mark.parametrize(
    ("base", "options", "error", "why"),
    [
        ("plain", {"into": "keep"}, UsageError, "no adapted weight is quantized; leave it out"),
        ("nf4", {"into": "nf4"}, UsageError, r"q: it is held in nf4 already; give into=\"keep\""),
        ("plain", {"into": "nf4", "arithmetic": "peft"}, UsageError, "exact `arithmetic` alone"),
        ("plain", {"rounding": "feedback"}, UsageError, "give `into`"),
        ("nf4", {}, UsageError, 'or "keep", for the nearest codes'),
    ],
)
def test_what_cannot_be_is_refused_with_the_next_step(base: str, options: Any, error: Any, why: str) -> None:
    with pytest.raises(error, match=why):
        surgery.merge(fitted(net(base)), **options)


def test_output_heads_go_into_no_format() -> None:
    model = net("plain")
    surgery.inject(model, surgery.LoraConfig(r=2, target_modules=["lm_head"]))
    with pytest.raises(MatchError, match=r"no adapted layer is an nn\.Linear that it could hold"):
        surgery.merge(model, into="nf4")


def test_layers_of_fp8_keep_their_own_blocks_and_run_on_a_cpu() -> None:
    model = surgery.merge(fitted(net("plain")), into="fp8_block", **ANY)
    assert type(model.q.base_layer) is FP8Linear
    assert model.q.base_layer.block_size == (128, 128)
    assert bool(model(TOKENS).isfinite().all())


def llama() -> Any:
    torch.manual_seed(0)
    sizes = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 1, "num_attention_heads": 4}
    return LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=99, tie_word_embeddings=False)).bfloat16().eval()


@pytest.mark.parametrize("into", LIVE_FORMS)
def test_a_model_of_transformers_that_keeps_the_merge_saves_itself_in_the_format(into: str, tmp_path: Path) -> None:
    model = surgery.inject(llama(), surgery.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    surgery.eject(surgery.merge(model, into=into, **ANY), keep_merged=True)
    model.save_pretrained(tmp_path)
    told = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    skipped = told.get("llm_int8_skip_modules", told.get("modules_to_not_convert"))
    assert {"model.layers.0.self_attn.k_proj", "lm_head"} <= {*skipped}
    q = model.model.layers[0].self_attn.q_proj
    written = load_file(tmp_path / "model.safetensors")
    name = "model.layers.0.self_attn.q_proj."
    found = {f"{name}{role}": one for role, one in packed_of_layer(q).tensors.items()}
    assert hashes(found).items() <= hashes(written).items()
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    q, other = (one.model.layers[0].self_attn.q_proj for one in (model, again))
    if into == "fp8_block":  # which is decoded without a GPU
        packed = packed_of_layer(q)
        assert torch.equal(other.weight, codec_of(packed, "").decode(packed, torch.bfloat16))
    else:
        assert hashes(packed_of_layer(other).tensors) == hashes(packed_of_layer(q).tensors)
    assert type(again.model.layers[0].self_attn.k_proj) is nn.Linear


def test_a_model_in_two_formats_refuses_to_save_itself(tmp_path: Path) -> None:
    model = surgery.quantize(llama(), "nf4")
    surgery.inject(model, surgery.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    surgery.eject(surgery.merge(model, into="int8", **ANY), keep_merged=True)
    with pytest.raises(ValueError, match="not serializable"):
        model.save_pretrained(tmp_path)
