"""Examples that models of transformers are traced with: made of their config, for each of the inputs that they take."""

import inspect
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from surgery.errors import InputError, printable
from surgery.formats.onnx.example import BATCH, Axes, Example

SEQ, DECODED, IMAGES = "sequence", "decoder_sequence", "image_batch"
_SIZES = {BATCH: 2, IMAGES: 3, SEQ: 6, DECODED: 4}
_LENGTH = {0: BATCH, 1: SEQ}


def example_for(model: Any) -> Example:
    """For a model of text, images, both, or log-mels. InputError for one of other inputs."""
    takes = inspect.signature(model.forward).parameters
    axes = _axes(model, takes)
    if model.main_input_name not in axes:
        raise InputError(
            f"a {printable(type(model).__name__)}: its main input is {printable(model.main_input_name)}, for which no "
            "example is known; load the model, and give inputs and dynamic_axes to surgery.export_onnx"
        )
    fixed = {name: value for name, value in (("return_dict", True), ("use_cache", False)) if name in takes}
    make = partial(_made, model.config, axes)
    return Example(make(_SIZES, 0), axes, fixed, make)


def _axes(model: Any, takes: Mapping[str, Any]) -> Axes:
    config, main = model.config, model.main_input_name
    axes: dict[str, Mapping[int, str]] = {}
    if main == "input_ids":
        axes |= {"input_ids": _LENGTH, "attention_mask": _LENGTH}
        if "token_type_ids" in takes and _told(config, "type_vocab_size") > 1:
            axes["token_type_ids"] = _LENGTH
    if "pixel_values" in takes and main in ("pixel_values", "input_ids") and _told(config, "image_size"):
        axes["pixel_values"] = {0: BATCH if main == "pixel_values" else IMAGES}
    if main == "input_features" and _told(config, "num_mel_bins"):
        axes["input_features"] = {0: BATCH}
    if config.is_encoder_decoder:
        axes["decoder_input_ids"] = {0: BATCH, 1: DECODED}
    return {name: one for name, one in axes.items() if name in takes}


def _made(config: Any, axes: Axes, sizes: Mapping[str, int], seed: int) -> dict[str, Tensor]:
    """Random inputs. Where there are several rows, the first is padded on the left."""
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for name, told in axes.items():
        shape = [sizes[symbol] for symbol in told.values()]
        if name == "pixel_values":
            side = _told(config, "image_size")
            found[name] = torch.randn(*shape, _told(config, "num_channels") or 3, side, side, generator=generator)
        elif name == "input_features":
            frames = 2 * _told(config, "max_source_positions")
            found[name] = torch.randn(*shape, _told(config, "num_mel_bins"), frames, generator=generator)
        elif name == "attention_mask":
            found[name] = torch.ones(shape, dtype=torch.int64)
            found[name][:-1, : shape[1] // 3] = 0
        elif name == "token_type_ids":
            found[name] = torch.randint(2, shape, generator=generator)
        else:
            found[name] = torch.randint(_told(config, "vocab_size"), shape, generator=generator)
            if _told(config, "eos_token_id") < _told(config, "vocab_size"):  # where CLIP looks for its text
                found[name][:, -1] = _told(config, "eos_token_id")
    return found


def _told(config: Any, name: str) -> int:
    """A number of the config, or of that of its text or images; 0 if it has none."""
    parts = (config, config.get_text_config(), getattr(config, "vision_config", None))
    return next((value for part in parts if isinstance(value := getattr(part, name, None), int)), 0)
