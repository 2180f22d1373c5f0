"""Models whose tensors transformers calls otherwise than their files: adapters have its names, and merges find them."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from compressed_tensors.utils.match import match_named_modules
from safetensors.torch import load_file

import surgery

_SIZES = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
_TEXT = {**_SIZES, "vocab_size": 32, "num_key_value_heads": 2}
_IMAGES = {**_SIZES, "image_size": 8, "patch_size": 4}
FOUR_BIT = "Linear4bit"
_ROPE = {"rope_type": "default", "mrope_section": [1, 1, 2]}

RENAMED: Mapping[str, tuple[Any, Callable[[], Any]]] = {
    "vit": (transformers.ViTForImageClassification, lambda: transformers.ViTConfig(**_IMAGES)),
    "dinov2": (transformers.Dinov2ForImageClassification, lambda: transformers.Dinov2Config(**_IMAGES)),
    "llava": (
        transformers.LlavaForConditionalGeneration,
        lambda: transformers.LlavaConfig(
            text_config=transformers.LlamaConfig(**_TEXT),
            vision_config=transformers.CLIPVisionConfig(**_IMAGES),
            image_token_index=31,
        ),
    ),
    "qwen2-vl": (
        transformers.Qwen2VLForConditionalGeneration,
        lambda: transformers.Qwen2VLConfig(
            text_config={**_TEXT, "rope_parameters": _ROPE},
            vision_config={"depth": 1, "embed_dim": 16, "hidden_size": 16, "num_heads": 2},
        ),
    ),
}


@pytest.fixture(params=RENAMED)
def made(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Any, Path, Path]:
    """The model's class, its base, and an adapter of PEFT over all its linear layers."""
    kind, config = RENAMED[request.param]
    torch.manual_seed(0)
    kind(config()).save_pretrained(tmp_path / "base")
    alphas = {"q_proj": 8}
    settings = peft.LoraConfig(
        r=2, target_modules="all-linear", exclude_modules=["k_proj"], alpha_pattern=alphas, init_lora_weights=False
    )
    peft.get_peft_model(kind.from_pretrained(tmp_path / "base"), settings).save_pretrained(tmp_path / "adapter")
    return kind, tmp_path / "base", tmp_path / "adapter"


def test_an_adapter_of_the_names_in_memory_is_merged_into_the_files(
    made: tuple[Any, Path, Path], tmp_path: Path
) -> None:
    kind, base, adapter = made
    live = surgery.load(kind.from_pretrained(base), adapter)
    surgery.merge(live)
    surgery.eject(live, keep_merged=True)
    surgery.merge_checkpoint(base, adapter, tmp_path / "out", reversible=True)
    merged, told = kind.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert (told["missing_keys"], told["unexpected_keys"]) == (set(), set())
    found = merged.state_dict()
    assert all(torch.equal(found[name], values) for name, values in live.state_dict().items())
    assert surgery.verify_checkpoint(base, adapter, tmp_path / "out").ok
    surgery.unmerge_checkpoint(tmp_path / "out", tmp_path / "back")
    for file in base.iterdir():
        assert (tmp_path / "back" / file.name).read_bytes() == file.read_bytes()


@pytest.mark.parametrize("targets", [["query_key_value"], ["query_key_value", "lm_head"]], ids=["saved", "adapted"])
def test_a_head_that_the_files_call_otherwise_is_changed_there(targets: list[str], tmp_path: Path) -> None:
    """Though all the other names of the adapter are those of the files."""
    kind, fields = transformers.GPTNeoXForCausalLM, {"r": 2, "target_modules": targets, "init_lora_weights": False}
    fields |= {} if "lm_head" in targets else {"modules_to_save": ["lm_head"]}
    kind(transformers.GPTNeoXConfig(**_SIZES, vocab_size=32, tie_word_embeddings=False)).save_pretrained(
        tmp_path / "base"
    )
    theirs = peft.get_peft_model(kind.from_pretrained(tmp_path / "base"), peft.LoraConfig(**fields))
    with torch.no_grad():
        for name, values in theirs.named_parameters():
            values.add_("modules_to_save" in name)
    theirs.save_pretrained(tmp_path / "adapter")
    live = surgery.load(kind.from_pretrained(tmp_path / "base"), tmp_path / "adapter")
    surgery.save_merged(live, tmp_path / "live")
    surgery.merge_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    found, wanted = (load_file(tmp_path / where / "model.safetensors") for where in ("out", "live"))
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], values) for name, values in wanted.items())
    assert not torch.equal(
        found["embed_out.weight"], load_file(tmp_path / "base/model.safetensors")["embed_out.weight"]
    )


def test_an_adapter_tells_another_base_by_the_names_in_memory_too(made: tuple[Any, Path, Path], tmp_path: Path) -> None:
    kind, base, adapter = made
    surgery.save(surgery.load(kind.from_pretrained(base), adapter), tmp_path / "saved")
    surgery.merge_checkpoint(base, tmp_path / "saved", tmp_path / "out")
    other = kind.from_pretrained(base)
    for parameter in other.parameters():
        parameter.data += 1
    other.save_pretrained(tmp_path / "other")
    with pytest.raises(surgery.InputError, match="trained on another base"):
        surgery.merge_checkpoint(tmp_path / "other", tmp_path / "saved", tmp_path / "x")


def test_all_that_transformers_quantizes_goes_into_a_format(made: tuple[Any, Path, Path], tmp_path: Path) -> None:
    """And the model that it loads computes with what the codes are decoded to."""
    kind, base, adapter = made
    wanted = kind.from_pretrained(base, dtype=torch.bfloat16)
    linear = {name for name, one in surgery.quantize(wanted, "nf4").named_modules() if type(one).__name__ == FOUR_BIT}
    any_loss = {"min_retained": 0.0, "max_noise": 99.0}
    surgery.merge_checkpoint(base, adapter, tmp_path / "out", into="nf4", dtype="bfloat16", **any_loss)
    model, told = kind.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert (told["missing_keys"], told["unexpected_keys"]) == (set(), set())
    assert {name for name, one in model.named_modules() if type(one).__name__ == FOUR_BIT} == linear
    surgery.merge_checkpoint(base, adapter, tmp_path / "16bit", dtype="bfloat16")
    held = dict(surgery.quantize(kind.from_pretrained(tmp_path / "16bit"), "nf4").named_parameters())
    assert all(torch.equal(values, held[name]) for name, values in model.named_parameters() if name[:-7] in linear)


def test_what_is_extracted_has_the_names_in_memory(made: tuple[Any, Path, Path], tmp_path: Path) -> None:
    """So that a live model finds it, and files do."""
    kind, base, _ = made
    tuned = kind.from_pretrained(base)
    changed = {name for name, one in tuned.named_modules() if type(one) is torch.nn.Linear and name.endswith(".q_proj")}
    with torch.no_grad():
        for name in changed:
            weight = tuned.get_submodule(name).weight
            weight.add_(torch.ones(len(weight), 1) @ torch.ones(1, weight.shape[1]) / 8)
    tuned.save_pretrained(tmp_path / "tuned")
    report = surgery.extract(base, tmp_path / "tuned", tmp_path / "extracted", rank=1)
    assert report.sites.keys() == changed != set()
    live = surgery.merge(surgery.load(kind.from_pretrained(base), tmp_path / "extracted"))
    found = surgery.eject(live, keep_merged=True).state_dict()
    for name in changed:
        wanted = tuned.get_submodule(name).weight
        assert (found[f"{name}.weight"] - wanted).abs().max() <= 64 * torch.finfo(torch.float32).eps
    surgery.merge_checkpoint(base, tmp_path / "extracted", tmp_path / "again")
    again = kind.from_pretrained(tmp_path / "again").state_dict()
    assert all(torch.equal(again[name], values) for name, values in found.items())


def test_a_linear_layer_of_a_class_of_its_own_is_told_to_be_plain_and_is_extracted(tmp_path: Path) -> None:
    """The out_proj of an nn.MultiheadAttention, which compressed-tensors takes for a Linear by its parent's name."""
    kind, sizes = transformers.SiglipForImageClassification, {"hidden_size": 128, "intermediate_size": 256}
    config = transformers.SiglipConfig(text_config={**_TEXT}, vision_config={**_IMAGES, **sizes}, num_labels=2)
    base = kind(config).bfloat16()
    base.save_pretrained(tmp_path / "base")
    target = "vision_model.head.attention.out_proj"
    settings = surgery.LoraConfig(r=2, target_modules=[target, "fc1"], init_lora_weights=False)
    surgery.save(surgery.inject(kind.from_pretrained(tmp_path / "base"), settings), tmp_path / "adapter")
    options = {"into": "w4a16", "min_retained": 0.0, "max_noise": 99.0}
    surgery.merge_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "out", **options)
    told = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    looked_for = {name for name, _ in match_named_modules(base, ["Linear"], told["ignore"])}
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert looked_for == {name.removesuffix(".weight_packed") for name in found if name.endswith("packed")} != set()
    surgery.merge_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "16bit")
    report = surgery.extract(tmp_path / "base", tmp_path / "16bit", tmp_path / "extracted", rank=2)
    assert target in report.sites
    surgery.load(kind.from_pretrained(tmp_path / "base"), tmp_path / "extracted")
