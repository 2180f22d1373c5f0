"""An adapter aware of a format, merged into it, as the library of the format loads and decodes it: to the bit."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    CompressedTensorsConfig,
    LlamaConfig,
    LlamaForCausalLM,
    TorchAoConfig,
)

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


def in_format(form: str, base: Path, folder: Path) -> Path:
    """The base itself, held so: merged with an adapter that changes nothing."""
    config = surgery.LoraConfig(r=1, target_modules=["q_proj"])  # as it begins, B is zero
    surgery.save(surgery.inject(AutoModelForCausalLM.from_pretrained(base), config), folder / "none")
    surgery.merge_checkpoint(base, folder / "none", folder / "held", into=form, **ANY)
    return folder / "held"


def test_torchao_s_word_of_what_a_weight_was_before_goes_from_every_file(base: Path, tmp_path: Path) -> None:
    """A file of which nothing else changes has the base's headers elsewhere."""
    config = surgery.LoraConfig(r=1, target_modules=["q_proj"])
    surgery.save(surgery.inject(AutoModelForCausalLM.from_pretrained(base), config), tmp_path / "none")
    (tmp_path / "none" / "surgery.base.json").unlink()  # it is merged into two bases
    options = {"max_shard_size": 20_000, **ANY}
    surgery.merge_checkpoint(base, tmp_path / "none", tmp_path / "held", into="torchao-fp8", **options)
    surgery.merge_checkpoint(tmp_path / "held", tmp_path / "none", tmp_path / "out", into="torchao-int8", **ANY)
    plain = []
    for file in (tmp_path / "out").glob("*.safetensors"):
        with safe_open(file, "pt") as opened:
            assert not any("Float8Tensor" in value for value in opened.metadata().values())
            plain += [] if any("qdata" in name for name in opened.keys()) else [file]  # noqa: SIM118  # it has no iter
    assert plain
    AutoModelForCausalLM.from_pretrained(tmp_path / "out")


def decoded(folder: Path, form: str) -> Any:
    """As transformers loads it plainly; fp8 without a GPU unasked."""
    asked = {} if form == "fp8_block" else {"quantization_config": CompressedTensorsConfig(dequantize=True)}
    return AutoModelForCausalLM.from_pretrained(folder, **asked)


@pytest.mark.parametrize("use", [{}, {"use_dora": True}], ids=["lora", "dora"])
@pytest.mark.parametrize("form", [*AS_THEY_COME, *QUANTIZED, "fp8_block"])
def test_over_a_decoded_base_it_runs_to_the_bit_as_the_merge_that_keeps_the_codes_of_its_files(
    form: str, use: dict[str, bool], base: Path, tmp_path: Path
) -> None:
    held = in_format(form, base, tmp_path)
    model = decoded(held, form)
    torch.manual_seed(1)
    config = surgery.LoraConfig(r=4, lora_alpha=64, target_modules=ALL, init_lora_weights=False, **use)
    with pytest.warns(UserWarning, match="surgery merge --into keep, of the saved adapter writes it"):
        surgery.inject(model, config, quantization_aware="keep")
    surgery.save(model, tmp_path / "adapter")
    surgery.merge_checkpoint(held, tmp_path / "adapter", tmp_path / "out", into="keep", **ANY)
    merged = decoded(tmp_path / "out", form)
    changed = 0
    for name, module in merged.named_modules():
        if name.endswith(tuple(ALL)):
            aware = model.get_submodule(name)
            assert torch.equal(aware.weight, module.weight)
            changed += not torch.equal(aware.base_layer.weight, module.weight)
    assert changed == 14
    assert torch.equal(outputs(merged), outputs(model))
    again = decoded(held, form)
    surgery.load(again, tmp_path / "adapter", quantization_aware="keep")
    assert torch.equal(outputs(again), outputs(model))
    surgery.inject(again, config, adapter_name="b", quantization_aware="keep")  # of the same files
    with pytest.raises(surgery.StateError, match="aware of another format"):
        surgery.inject(again, config, adapter_name="c", quantization_aware="w8a8")


@pytest.mark.parametrize("form", ["w4a16", "nvfp4", "fp8_dynamic"])
def test_a_base_that_is_decoded_to_another_dtype_runs_as_its_merge_is_loaded_then(
    form: str, base: Path, tmp_path: Path
) -> None:
    """The libraries decode to bfloat16 first."""
    held = in_format(form, base, tmp_path)
    asked = {"quantization_config": CompressedTensorsConfig(dequantize=True), "dtype": torch.float32}
    model = AutoModelForCausalLM.from_pretrained(held, **asked)
    torch.manual_seed(1)
    config = surgery.LoraConfig(r=4, lora_alpha=64, target_modules=ALL, init_lora_weights=False)
    surgery.inject(model, config, quantization_aware="keep")
    surgery.save(model, tmp_path / "adapter")
    surgery.merge_checkpoint(held, tmp_path / "adapter", tmp_path / "out", into="keep", **ANY)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out", **asked)
    layers = [name for name, _ in merged.named_modules() if name.endswith(tuple(ALL))]
    assert len(layers) == 14
    assert all(torch.equal(model.get_submodule(one).weight, merged.get_submodule(one).weight) for one in layers)
    assert torch.equal(outputs(merged), outputs(model))


def test_what_keeps_no_codes_is_refused_with_the_next_step(base: Path, tmp_path: Path) -> None:
    held, asked = in_format("w4a16", base, tmp_path), CompressedTensorsConfig(dequantize=True)
    config = surgery.LoraConfig(r=1, target_modules=ALL)

    def refused(model: Any, error: type[Exception], told: str) -> None:
        before = list(model.modules())
        with pytest.raises(error, match=told):
            surgery.inject(model, config, quantization_aware="keep")
        assert list(model.modules()) == before

    refused(AutoModelForCausalLM.from_pretrained(base), surgery.MatchError, "is held in codes; leave it out")
    refused(LlamaForCausalLM(LlamaConfig(**SIZES)), surgery.UsageError, "which files it was loaded from")
    refused(AutoModelForCausalLM.from_pretrained(held), surgery.MatchError, r"compressed-tensors.*dequantize=True")
    headless = AutoModel.from_pretrained(held, quantization_config=asked)
    refused(headless, surgery.MatchError, r"layers\.0\..*, whose codes a merge would keep, holds nothing")
    changed = AutoModelForCausalLM.from_pretrained(held, quantization_config=asked)
    with torch.no_grad():
        changed.model.layers[1].mlp.up_proj.weight[0, 0] += 1
    refused(changed, surgery.MatchError, r"layers\.1\.mlp\.up_proj: its weight is not what .*held decodes to")


def test_layers_that_their_files_hold_plainly_are_merged_as_ever(base: Path, tmp_path: Path) -> None:
    held, asked = in_format("w4a16", base, tmp_path), CompressedTensorsConfig(dequantize=True)
    models = [AutoModelForCausalLM.from_pretrained(held, quantization_config=asked) for _ in range(2)]
    for model, aware in zip(models, ("keep", None), strict=True):
        torch.manual_seed(1)
        config = surgery.LoraConfig(r=2, target_modules=["lm_head", "q_proj"], init_lora_weights=False)
        surgery.inject(model, config, quantization_aware=aware)
    assert torch.equal(*(model.lm_head.weight for model in models))
    assert not torch.equal(*(model.model.layers[0].self_attn.q_proj.weight for model in models))


@pytest.mark.parametrize("form", ["nf4", "int8"])
def test_live_layers_keep_the_codes_that_they_hold(form: str) -> None:
    """No files are looked for."""

    def made(aware: str) -> Any:
        torch.manual_seed(0)
        net = surgery.quantize(torch.nn.Sequential(torch.nn.Linear(64, 64)).bfloat16(), form)
        config = surgery.LoraConfig(r=2, target_modules=["0"], init_lora_weights=False)
        return surgery.inject(net, config, quantization_aware=aware)[0]

    assert torch.equal(made("keep").weight, made(form).weight)
    assert not torch.equal(made("keep").weight, made("w8a8").weight)


def test_load_model_decodes_what_a_config_of_its_method_asks_for(base: Path, tmp_path: Path) -> None:
    held, asked = in_format("w4a16", base, tmp_path), CompressedTensorsConfig(dequantize=True)
    model = surgery.load_model(held, quantization=asked)
    assert torch.equal(outputs(model), outputs(AutoModelForCausalLM.from_pretrained(held, quantization_config=asked)))
    surgery.inject(model, surgery.LoraConfig(r=2, target_modules=["q_proj"]))
    with pytest.raises(surgery.UsageError, match="by compressed-tensors; leave it out, or give transformers' config"):
        surgery.load_model(held, quantization="nf4")
