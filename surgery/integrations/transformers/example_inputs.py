"""Example inputs: what a model of transformers takes, made from its config, the same on every machine."""

import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from surgery.errors import UsageError

BATCH, LENGTH, DECODED = 3, 13, 7  # rows, tokens in each, and tokens for a decoder
# Tokens of padding in each row, behind its first: what attends to nothing at all, as padding at the left end, is NaN in
# float64 where a model adds a mask to its scores itself, and then in the whole row.
PADDED = (5, 2, 0)
SAMPLES = 4000  # of a wave: a quarter of a second


def example_inputs(model: nn.Module) -> dict[str, Any]:
    """Keyword arguments of `model`: its main input, a mask with padding, and tokens for a decoder.

    UsageError, saying what is wanted, for a model of another kind.
    """
    main, config = str(getattr(model, "main_input_name", "")), _config(model)
    if main not in _MAKERS or (main == "input_ids" and _vocabulary(_of_tokens(config, "encoder")) is None):
        found = f"its main input is {main or 'unknown'}, and {', '.join(_MAKERS)} are made from a config"
        if main in _MAKERS:  # where a model says nothing, it is input_ids
            found = "its config tells no vocab_size, from which tokens are made"
        raise UsageError(
            f"{type(model).__name__}: {found}; its forward takes {', '.join(arguments(model))}; in Python, "
            "verify_checkpoint(..., inputs={...}) gives them"
        )
    generator = torch.Generator().manual_seed(0)
    made = _MAKERS[main](model, config, generator)
    if main == "input_ids" and _pairs(config):
        made |= _image(model, config, generator)
    if getattr(config, "is_encoder_decoder", False):
        made["decoder_input_ids"] = _tokens(_of_tokens(config, "decoder"), (len(made[main]), DECODED), generator)
    made["use_cache"] = False  # it is no output to compare
    return {name: value for name, value in made.items() if name == main or name in arguments(model)}


def arguments(given: object) -> list[str]:
    """The names of inputs, or of those that a model's forward takes."""
    if isinstance(given, nn.Module):
        return [name for name in inspect.signature(type(given).forward).parameters if name != "self"]
    return list(given) if isinstance(given, Mapping) else [type(given).__name__]


def _text(model: nn.Module, config: Any, generator: torch.Generator) -> dict[str, Tensor]:
    """Tokens that mean nothing special, with padding, which some classifiers take only where they know its token."""
    text = _of_tokens(config, "encoder")
    longest = getattr(text, "max_position_embeddings", None)
    length = min(LENGTH, longest // 2) if longest and longest > 0 else LENGTH  # a few may be set aside; XLNet has -1
    tokens, mask = _tokens(text, (BATCH, length), generator), torch.ones(BATCH, length, dtype=torch.long)
    pad, end = (getattr(text, f"{one}_token_id", None) for one in ("pad", "eos"))
    if isinstance(end, int) and end < text.vocab_size:  # small models have been given the names of large ones
        tokens[:, -1] = end  # where classifiers look
    if pad is None and type(model).__name__.endswith("SequenceClassification"):
        return {"input_ids": tokens[:1], "attention_mask": mask[:1]}
    for row, padding in enumerate(PADDED):
        mask[row, 1 : 1 + min(padding, length - 2)] = 0
    return {"input_ids": torch.where(mask == 1, tokens, min(pad or 0, text.vocab_size - 1)), "attention_mask": mask}


def _image(model: nn.Module, config: Any, generator: torch.Generator) -> dict[str, Tensor]:
    del model
    vision = getattr(config, "vision_config", getattr(config, "encoder", config))
    size = getattr(vision, "image_size", None) or 224
    height, width = size if isinstance(size, list | tuple) else (size, size)
    shape = BATCH, getattr(vision, "num_channels", 3), height, width
    return {"pixel_values": torch.randn(shape, generator=generator)}


def _mel(model: nn.Module, config: Any, generator: torch.Generator) -> dict[str, Tensor]:
    """Whisper's: two frames for each position of its encoder."""
    del model
    shape = 2, getattr(config, "num_mel_bins", 80), 2 * getattr(config, "max_source_positions", 1500)
    return {"input_features": torch.randn(shape, generator=generator)}


def _wave(model: nn.Module, config: Any, generator: torch.Generator) -> dict[str, Tensor]:
    """A wave, or, where the config counts bins, a spectrogram."""
    del model
    bins, frames = getattr(config, "num_mel_bins", None), getattr(config, "max_length", None)
    shape = (2, frames, bins) if bins and frames else (2, SAMPLES)
    return {"input_values": torch.randn(shape, generator=generator)}


_MAKERS: Mapping[str, Callable[[nn.Module, Any, torch.Generator], dict[str, Any]]] = {
    "input_ids": _text,
    "pixel_values": _image,
    "input_features": _mel,
    "input_values": _wave,
}


def _pairs(config: Any) -> bool:
    """Are texts compared with images? Where these stand among the tokens instead, there is a token for them."""
    told = config.to_dict()
    return "vision_config" in told and not {"image_token_id", "image_token_index"} & told.keys()


def _of_tokens(config: Any, part: str) -> Any:
    """The config of what takes the tokens: that of this part, where a model joins an encoder to a decoder."""
    own = getattr(config, part, None)
    return config.get_text_config() if _vocabulary(own) is None else own


def _vocabulary(config: Any) -> int | None:
    size: int | None = getattr(config, "vocab_size", None)
    return size


def _config(model: nn.Module) -> Any:
    return model.config


def _tokens(config: Any, shape: tuple[int, int], generator: torch.Generator) -> Tensor:
    """Of the vocabulary, but for the tokens that the config names: one for an image would want an image."""
    named = set(_named(config.to_dict()))
    plain = torch.tensor([token for token in range(config.vocab_size) if token not in named])
    return plain[torch.randint(len(plain), shape, generator=generator)]


def _named(config: Mapping[Any, Any]) -> Iterator[int]:
    for name, value in config.items():
        if isinstance(value, Mapping):
            yield from _named(value)
        elif str(name).endswith(("token_id", "token_index")):
            yield from value if isinstance(value, list) else [value]
