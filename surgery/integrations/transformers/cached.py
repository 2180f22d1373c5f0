"""Decoders with a cache: one graph for prompts and for the tokens that follow.

Names are those of optimum and onnxruntime-genai: past_key_values.N.key in, present.N.key out,
[batch, heads, past, size].
"""

import inspect
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from surgery.errors import InputError, printable
from surgery.formats.onnx.example import BATCH, CACHE, Axes, Decoding, Example
from surgery.hosts.twin import Weightless
from surgery.integrations.transformers.examples import SEQ
from surgery.integrations.transformers.exporting import Pretrained

PAST, TOTAL = "past_sequence", "total_sequence"
_SIZES = {BATCH: 2, SEQ: 3, PAST: 5}
# A prompt, a part of one after another, and single tokens. What follows a past may be padded on its left.
_TRIED = ({BATCH: 1, SEQ: 7, PAST: 0}, _SIZES, {BATCH: 3, SEQ: 1, PAST: 9})
_STEPS = 12


def cached_example(plain: Weightless) -> Example:
    """For a decoder of text, whose model without weights tells the shapes of its cache. InputError for another."""
    model: Any = plain.module
    takes = inspect.signature(model.forward).parameters
    if model.config.is_encoder_decoder or not model.can_generate() or model.main_input_name != "input_ids":
        raise InputError(
            f"a {printable(type(model).__name__)}: no decoder of text, and has no cache that a graph could take; "
            "export it without `kv`"
        )
    Pretrained().prepare(plain.module)  # grouped products of experts have no shapes of their own
    shapes = _shapes(plain)
    axes: dict[str, Mapping[int, str]] = {"input_ids": {0: BATCH, 1: SEQ}, "attention_mask": {0: BATCH, 1: TOTAL}}
    if "position_ids" in takes:
        axes["position_ids"] = {0: BATCH, 1: SEQ}
    axes |= {name: {0: BATCH, 2: PAST} for name in shapes}
    make = partial(_made, model.config.get_text_config().vocab_size, shapes, axes)
    prompt = make({**_SIZES, BATCH: 1}, 7)["input_ids"]
    decoding = Decoding(prompt, _STEPS, _tokens)
    return Example(make(_SIZES, 0), axes, {"use_cache": True}, make, _call, _TRIED, decoding)


def _shapes(plain: Weightless) -> dict[str, tuple[int, int]]:
    """Heads and their size, of each tensor of the cache."""
    with plain.mode, torch.no_grad():
        given: Any = plain.module
        cache = given(input_ids=torch.zeros(2, 3, dtype=torch.int64), use_cache=True).past_key_values
    layers = getattr(cache, "layers", [])
    if not layers or not all(isinstance(getattr(one, "keys", None), Tensor) for one in layers):
        raise InputError(
            f"a {printable(type(given).__name__)}: its cache is a {type(cache).__name__}, not keys and values for each "
            "layer; export it without `kv`"
        )
    return {
        f"{CACHE}.{i}.{what}": (values.shape[1], values.shape[3])
        for i, one in enumerate(layers)
        for what, values in (("key", one.keys), ("value", one.values))
    }


def _made(
    vocabulary: int, shapes: Mapping[str, tuple[int, int]], axes: Axes, sizes: Mapping[str, int], seed: int
) -> dict[str, Tensor]:
    """Random inputs. Of several rows the first has a padded past."""
    generator = torch.Generator().manual_seed(seed)
    batch, length, past = sizes[BATCH], sizes[SEQ], sizes[PAST]
    mask = torch.ones(batch, past + length, dtype=torch.int64)
    mask[:-1, : past // 2] = 0
    found = {"input_ids": torch.randint(vocabulary, (batch, length), generator=generator), "attention_mask": mask}
    if "position_ids" in axes:
        found["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0)[:, past:]
    for name, (heads, size) in shapes.items():
        found[name] = torch.randn(batch, heads, past, size, generator=generator)
    return found


def _call(module: nn.Module, inputs: Mapping[str, Any]) -> dict[str, Tensor]:
    from transformers.cache_utils import DynamicCache

    given = {name: values for name, values in inputs.items() if not name.startswith(CACHE)}
    count = (len(inputs) - len(given)) // 2
    cache = DynamicCache()  # of whole layers, also where attention has a window: the mask sees to that
    for i in range(count):
        cache.update(inputs[f"{CACHE}.{i}.key"], inputs[f"{CACHE}.{i}.value"], i)
    out = module(**given, past_key_values=cache)
    found = {"logits": out.logits}
    for i, layer in enumerate(out.past_key_values.layers):
        found |= {f"present.{i}.key": layer.keys, f"present.{i}.value": layer.values}
    return found


def _tokens(model: Any, prompt: Tensor, steps: int) -> Tensor:
    """By the model's own `generate`."""
    from transformers import GenerationConfig

    kind: Any = GenerationConfig
    config = kind(do_sample=False, num_beams=1, max_new_tokens=steps, min_new_tokens=steps, pad_token_id=0)
    found: Tensor = model.generate(prompt, attention_mask=torch.ones_like(prompt), generation_config=config)
    return found[0, prompt.shape[1] :]
