"""Models whose tensors transformers calls otherwise than their files: adapters have its names, and merges find them."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers

import surgery

_SIZES = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
_TEXT = {**_SIZES, "vocab_size": 32, "num_key_value_heads": 2}
_IMAGES = {**_SIZES, "image_size": 8, "patch_size": 4}
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
