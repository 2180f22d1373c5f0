"""verify --outputs: adapters over their base, and a merged model, give the same outputs, or the command says so."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

import surgery
from surgery.cli import main
from surgery.integrations.transformers.example_inputs import example_inputs
from surgery.testing import assert_equivalent

SMALL = {"num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 99, "pad_token_id": 0, "eos_token_id": 1}
WIDE = {"hidden_size": 32, "intermediate_size": 64}
ENDS = {"encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2, "decoder_attention_heads": 2}
ENDS |= {"d_model": 16, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32, "vocab_size": 99, "max_position_embeddings": 40}
ENDS |= {"pad_token_id": 0, "eos_token_id": 1, "decoder_start_token_id": 1, "max_length": 20}
SITE = "model.layers.1.self_attn.v_proj.weight"
CONVS = {"conv_dim": (16, 16), "conv_stride": (5, 4), "conv_kernel": (10, 4), "num_feat_extract_layers": 2}
IMAGES = {"image_size": 16, "patch_size": 4}
PART = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
TEXTS = SMALL | WIDE | {"model_type": "bert"}
CROSSED = {"is_decoder": True, "add_cross_attention": True}
VIEWS = {"model_type": "vit", "num_hidden_layers": 2, "num_attention_heads": 4}

MODELS: dict[str, tuple[dict[str, Any], list[str]]] = {
    "LlamaForCausalLM": (SMALL | WIDE, ["q_proj", "v_proj", "down_proj"]),
    "MixtralForCausalLM": (SMALL | WIDE | {"num_local_experts": 4, "num_key_value_heads": 2}, ["q_proj", "v_proj"]),
    "GPT2LMHeadModel": ({"n_layer": 2, "n_head": 2, "n_embd": 16, "vocab_size": 99, "n_positions": 40}, ["c_attn"]),
    "BloomForCausalLM": ({"hidden_size": 32, "n_layer": 2, "n_head": 4, "vocab_size": 99}, ["query_key_value"]),
    "Gemma2ForCausalLM": (SMALL | WIDE | {"head_dim": 8, "num_key_value_heads": 2}, ["q_proj", "v_proj"]),
    "XLNetLMHeadModel": ({"d_model": 16, "n_layer": 1, "n_head": 2, "d_inner": 32, "vocab_size": 99}, ["layer_1"]),
    "BertForMaskedLM": (SMALL | WIDE, ["query", "value"]),
    "BertForQuestionAnswering": (SMALL | WIDE, ["query", "value"]),
    "LlamaForSequenceClassification": (SMALL | WIDE, ["q_proj", "v_proj"]),
    "T5ForConditionalGeneration": (
        {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2, "vocab_size": 99},
        ["q", "v"],
    ),
    "BartForConditionalGeneration": (ENDS, ["q_proj", "v_proj"]),
    "WhisperForConditionalGeneration": (
        ENDS | {"max_source_positions": 10, "max_target_positions": 20, "num_mel_bins": 8},
        ["q_proj", "v_proj"],
    ),
    "SiglipVisionModel": (WIDE | IMAGES | {"num_hidden_layers": 2, "num_attention_heads": 4}, ["q_proj", "v_proj"]),
    "CLIPModel": (
        {"text_config": PART | {"vocab_size": 99}, "vision_config": PART | IMAGES, "projection_dim": 8},
        ["q_proj", "v_proj"],
    ),
    "EncoderDecoderModel": (
        {"encoder": TEXTS, "decoder": TEXTS | CROSSED, "pad_token_id": 0, "decoder_start_token_id": 2},
        ["query", "value"],
    ),
    "VisionEncoderDecoderModel": (
        {"encoder": WIDE | IMAGES | VIEWS, "decoder": TEXTS | CROSSED, "pad_token_id": 0, "decoder_start_token_id": 2},
        ["q_proj", "value"],
    ),
    "Wav2Vec2ForCTC": (SMALL | WIDE | CONVS | {"num_conv_pos_embeddings": 8}, ["q_proj", "v_proj"]),
}


def made(name: str, folder: Path, dtype: torch.dtype = torch.float32, seed: int = 0, **fields: Any) -> Path:
    """A base of random weights that are large enough to matter, and an adapter on it; with `fields`."""
    torch.manual_seed(seed)
    kind, (sizes, targets) = getattr(transformers, name), (MODELS | UNKNOWN)[name]
    model = kind(kind.config_class(**sizes))
    with torch.no_grad():
        for values in model.parameters():
            if values.dim() == 2:
                values.normal_(0, values.shape[1] ** -0.5)
    model.to(dtype).save_pretrained(folder / "base")
    told = {"r": 4, "lora_alpha": 4, "target_modules": targets, "init_lora_weights": False} | fields
    surgery.save(surgery.inject(model, surgery.LoraConfig(**told)), folder / "adapter")
    return folder


def verified(folder: Path, **options: Any) -> surgery.VerifyReport:
    given = options.pop("adapters", folder / "adapter")
    return surgery.verify_checkpoint(folder / "base", given, folder / "out", outputs=True, **options)


def merged(folder: Path, adapters: Any = None, **options: Any) -> Path:
    surgery.merge_checkpoint(folder / "base", adapters or folder / "adapter", folder / "out", **options)
    return folder


def changed(folder: Path, change: Callable[[Tensor, Tensor], Tensor]) -> Path:
    """The weight of one site in the merge is what `change` makes of it and the base's."""
    path = folder / "out" / "model.safetensors"
    tensors, base = load_file(path), load_file(folder / "base" / "model.safetensors")
    tensors[SITE] = change(tensors[SITE], base[SITE]).contiguous()
    save_file(tensors, path, {"format": "pt"})
    return folder


SERIES = {"context_length": 32, "patch_length": 4, "patch_stride": 4, "num_hidden_layers": 1, "prediction_length": 4}
SERIES |= {"d_model": 16, "num_attention_heads": 2, "ffn_dim": 32, "num_input_channels": 1}
UNKNOWN = {"PatchTSTForPrediction": (SERIES, ["q_proj", "v_proj"])}


@pytest.mark.parametrize("name", MODELS)
def test_a_merge_of_any_kind_of_model_gives_the_outputs_of_its_adapter(name: str, tmp_path: Path) -> None:
    report = verified(merged(made(name, tmp_path)))
    assert report.outputs is not None
    assert report.ok, report.outputs.table()
    assert report.counts["equivalent"] >= 1
    assert max(one.effect or 0 for one in report.outputs.outputs) > 1e-2


def test_a_merge_into_stacks_of_experts_gives_the_outputs_of_its_adapter(tmp_path: Path) -> None:
    stacks = {"target_modules": [], "target_parameters": ["experts.gate_up_proj", "experts.down_proj"]}
    assert verified(merged(made("MixtralForCausalLM", tmp_path, **stacks))).ok


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_a_merge_in_any_dtype_is_within_its_own_noise(dtype: torch.dtype, tmp_path: Path) -> None:
    report = verified(merged(made("LlamaForCausalLM", tmp_path, dtype)), layers=True)
    assert report.ok
    assert report.counts["equivalent"] == 1 + 6


def test_weights_and_several_adapters_and_another_dtype_are_run_as_they_are_merged(tmp_path: Path) -> None:
    folder = made("LlamaForCausalLM", tmp_path)
    made("LlamaForCausalLM", tmp_path / "other", use_dora=True)
    both = [(folder / "adapter", 0.5), folder / "other" / "adapter"]
    assert verified(merged(folder, both, dtype="bfloat16"), adapters=both).ok
    assert not verified(folder, adapters=both[::-1][:1]).outputs.ok
    assert not verified(folder, adapters=[(folder / "adapter", 0.6), both[1]]).outputs.ok


def test_a_merge_by_peft_gives_the_same_outputs(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    for dtype in (torch.float32, torch.bfloat16):
        folder = made("LlamaForCausalLM", tmp_path / str(dtype), dtype)
        model = transformers.LlamaForCausalLM.from_pretrained(folder / "base", dtype=dtype)
        theirs = peft.PeftModel.from_pretrained(model, folder / "adapter").merge_and_unload()
        theirs.save_pretrained(folder / "out")
        assert verified(folder, layers=True).ok


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "change",
    [
        lambda _, base: base,
        lambda merged, base: base + 2 * (merged - base),
        lambda merged, base: base + (merged - base) / 2,
        lambda merged, base: base + (merged - base).T,
        lambda merged, _: merged.T,
    ],
    ids=["left out", "twice", "half", "its delta transposed", "transposed"],
)
def test_a_merge_that_is_wrong_at_one_site_fails_and_the_layer_is_named(
    change: Callable[[Tensor, Tensor], Tensor], dtype: torch.dtype, tmp_path: Path
) -> None:
    folder = changed(merged(made("LlamaForCausalLM", tmp_path, dtype)), change)
    report = verified(folder, layers=True)
    apart = [one.name for one in report.outputs.outputs if not one.ok]
    assert f"layer {SITE.removesuffix('.weight')}" in apart
    assert not any("layers.0" in name for name in apart)
    assert "logits" in apart
    assert report.outputs.why


@pytest.mark.parametrize("sized", [0.0, 1e-9])
def test_an_adapter_that_changes_nothing_or_less_than_rounding_does_not_pass(sized: float, tmp_path: Path) -> None:
    folder = made("LlamaForCausalLM", tmp_path)
    path = folder / "adapter" / "adapter_model.safetensors"
    small = {name: values * (sized if "lora_B" in name else 1) for name, values in load_file(path).items()}
    save_file(small, path)
    report = verified(merged(folder))
    assert report.counts["different"] == 0
    assert not report.ok
    assert ("changes no output" if sized == 0 else "whole effect") in report.outputs.why


def test_the_command_exits_4_and_all_reports_tell_the_figures(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    folder = merged(made("LlamaForCausalLM", tmp_path))
    files = [folder / f"report.{ending}" for ending in ("json", "md", "xml")]
    words = ["verify", *(str(folder / name) for name in ("base", "adapter", "out")), "--outputs", "--layers"]

    def run() -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as stopped:
            main([*words, *(word for file in files for word in ("--report", str(file)))])
        return stopped.value.code or 0, *capsys.readouterr()

    capsys.readouterr()
    code, out, err = run()
    assert (code, err) == (0, "")
    assert "7 equivalent" in out
    assert "output logits" in out
    for file in files:
        assert "logits" in file.read_text()
    told = json.loads(files[0].read_text())["outputs"]
    assert told["ok"]
    assert told["outputs"]["logits"]["found"]["top1"] == 1
    changed(folder, lambda _, base: base)
    code, out, err = run()
    assert code == 4
    assert "apart" in out
    assert err.startswith("surgery: ")
    assert "<failure" in files[2].read_text()


def test_inputs_that_are_given_are_run(tmp_path: Path) -> None:
    folder = merged(made("LlamaForCausalLM", tmp_path))
    tokens = torch.arange(24).reshape(2, 12)
    report = verified(folder, inputs={"input_ids": tokens})
    assert report.ok
    assert report.outputs.outputs[0].shape == (2, 12, 99)
    assert report.outputs.left_out == ("past_key_values (DynamicCache)",)
    for wrong in ({"pixel_values": tokens}, {"inputs_embeds": torch.ones(2, 5, 7)}):
        with pytest.raises(surgery.UsageError, match=r"does not run on .*its forward takes input_ids"):
            verified(folder, inputs=wrong)


@pytest.mark.parametrize(
    "broken", ["lacks a weight", "is of another shape", "is quantized", "has no config", "is one file", "is of no kind"]
)
def test_what_cannot_be_run_is_refused_by_name(broken: str, tmp_path: Path) -> None:
    folder = merged(made("LlamaForCausalLM", tmp_path))
    config, weights, given = folder / "out" / "config.json", folder / "out" / "model.safetensors", folder / "out"
    told = json.loads(config.read_text())
    match broken:
        case "lacks a weight":
            tensors = load_file(weights)
            del tensors["model.norm.weight"]
            save_file(tensors, weights, {"format": "pt"})
        case "is of another shape":
            save_file(load_file(weights) | {SITE: torch.ones(16, 32)}, weights, {"format": "pt"})
        case "is quantized":
            config.write_text(json.dumps(told | {"quantization_config": {"quant_method": "fp8"}}))
        case "has no config":
            config.unlink()
        case "is one file":
            given = weights
        case "is of no kind":
            config.write_text(json.dumps(told | {"architectures": ["NoSuchModel"]}))
    with pytest.raises(
        (surgery.InputError, surgery.CheckError), match=r"wanted|plain models only|no model of|cannot load"
    ):
        surgery.verify_checkpoint(folder / "base", folder / "adapter", given, outputs=True)


def test_a_quantized_model_is_refused_with_what_does_measure_it(tmp_path: Path) -> None:
    folder = merged(made("LlamaForCausalLM", tmp_path))
    base, adapter, out, more = folder / "base", folder / "adapter", folder / "in-codes", folder / "plain"
    surgery.merge_checkpoint(base, adapter, out, into="nf4", min_retained=-9.0, max_noise=9.0)
    with pytest.raises(surgery.InputError, match=r"in-codes: it is quantized; .*`probes=16` instead of `outputs`"):
        surgery.verify_checkpoint(base, adapter, out, outputs=True)
    assert "output error" in surgery.verify_checkpoint(base, adapter, out, probes=16).summary()
    surgery.merge_checkpoint(out, adapter, more)
    with pytest.raises(surgery.InputError, match=r"in-codes: it is quantized; .* leave `outputs` out"):
        surgery.verify_checkpoint(out, adapter, more, outputs=True)
    assert surgery.verify_checkpoint(out, adapter, more).counts["bits"] > 0


def test_a_model_whose_inputs_are_not_known_says_what_it_takes(tmp_path: Path) -> None:
    folder = merged(made("PatchTSTForPrediction", tmp_path))
    with pytest.raises(surgery.UsageError, match=r"main input is past_values, .*takes past_values.*inputs="):
        verified(folder)
    assert verified(folder, inputs={"past_values": torch.randn(2, 32, 1)}).ok


def test_a_part_of_a_model_that_takes_no_tokens_says_what_it_takes() -> None:
    """transformers calls its main input input_ids, as it does by default."""
    kind = transformers.Qwen3VLVisionModel
    with pytest.raises(surgery.UsageError, match=r"no vocab_size, .*takes hidden_states, grid_thw"):
        example_inputs(kind(kind.config_class(depth=1, hidden_size=16, num_heads=2, intermediate_size=16)))


@pytest.mark.parametrize("name", ["LlamaForCausalLM", "MixtralForCausalLM"])
def test_another_suite_compares_models_of_transformers_with_padding_and_caches(name: str, tmp_path: Path) -> None:
    folder, kind = merged(made(name, tmp_path)), getattr(transformers, name)
    adapted = surgery.load(surgery.load_model(folder / "base"), folder / "adapter")
    plain = kind.from_pretrained(folder / "out")
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    given = {"input_ids": torch.arange(10).reshape(2, 5), "attention_mask": mask}
    base = kind.from_pretrained(folder / "base")
    assert_equivalent(adapted, plain, given, base=base)
    for wrong in (base, lambda **inputs: plain(**inputs | {"attention_mask": mask.flip(1)})):
        with pytest.raises(AssertionError, match=r"not compared: past_key_values \(DynamicCache\)"):
            assert_equivalent(adapted, wrong, given)


def test_options_of_a_run_without_a_run_are_refused(tmp_path: Path) -> None:
    for options in ({"layers": True}, {"inputs": {}}):
        with pytest.raises(surgery.UsageError, match="give `outputs` too"):
            surgery.verify_checkpoint(tmp_path, tmp_path, tmp_path, **options)
    with pytest.raises(surgery.UsageError, match="base_as"):
        surgery.verify_checkpoint(tmp_path, tmp_path, tmp_path, outputs=True, base_as="nf4")
    with pytest.raises(surgery.UsageError, match="name base and adapters too"):
        surgery.verify_checkpoint(tmp_path, outputs=True)


def test_without_transformers_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = merged(made("LlamaForCausalLM", tmp_path))
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(surgery.EnvironmentFault, match=r"model-surgery\[hf\]"):
        verified(folder)
