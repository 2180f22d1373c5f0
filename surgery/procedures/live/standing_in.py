"""Standing in: a linear layer in the place of one held otherwise, for as long as adapters are merged into it."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from surgery.errors import UsageError, printable
from surgery.hosts.quantized import codec_name, decoded_to, decoder, hold, is_quantized, own_dtype, packed_of_layer
from surgery.hosts.tree import places
from surgery.layers import Adapted, Replaced, base_of

_HOOKS = (
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_backward_pre_hooks",
    "_backward_hooks",
    "_is_full_backward_hook",
)


def check_into(layers: Mapping[str, Adapted], into: str | None, arithmetic: str) -> None:
    """UsageError unless `into` says what becomes of quantized weights, where there are any, added to exactly."""
    there = next((name for name, layer in layers.items() if is_quantized(layer.base_layer)), None)
    if there is not None and into is None:
        raise UsageError(
            f"{printable(there)}: its weight is quantized, and no merge fits into its codes unchanged; give "
            'into="16bit", for plain weights while it is merged, or "keep", for the nearest codes'
        )
    if there is not None and arithmetic != "exact":
        raise UsageError(
            f"{printable(there)}: its weight is quantized, where arithmetic {printable(arithmetic)!r} is not known; "
            "leave it out"
        )
    if there is None and into in {"16bit", "keep"}:
        raise UsageError(f"merge: into is {into!r}, and no adapted weight is quantized; leave it out")


@contextmanager
def standing_in(layers: Sequence[Adapted], model_dtype: torch.dtype) -> Iterator[None]:
    """Plain layers are in the place of these from now on; on an error within, the very layers are."""
    try:
        for layer in layers:
            _stand_in(layer, model_dtype)
        yield
    except BaseException:
        for layer in layers:
            put_back(layer)
        raise


def _stand_in(layer: Adapted, model_dtype: torch.dtype) -> None:
    """Put a plain layer there, with the weight as the quantized one computes with it."""
    quantized: Any = layer.base_layer
    made = nn.Linear(quantized.in_features, quantized.out_features, device="meta", bias=quantized.bias is not None)
    made.weight = _frozen(decoded_to(quantized, _computed(quantized, model_dtype)))
    if quantized.bias is not None:
        made.bias = _frozen(quantized.bias.detach().clone())
    made.train(quantized.training)
    _hook_alike(made, quantized)
    layer._modules["base_layer"] = made
    layer.__dict__.update(beneath=quantized, decode=None)


def succeed(layer: Adapted, made: nn.Module) -> None:
    """Put a quantized layer there, which holds the merged weight."""
    beneath = layer.base_layer if layer.beneath is None else layer.beneath
    _hook_alike(made, beneath)
    layer._modules["base_layer"] = made
    layer.__dict__.update(beneath=beneath, decode=decoder(made))


def settle(layer: Adapted, model_dtype: torch.dtype) -> None:
    """The merged layer has one dtype, to which its weight has been rounded already."""
    made: Any = layer.base_layer
    made.to(plain_dtype(layer.beneath, model_dtype))


def put_back(layer: Adapted) -> None:
    """The very layer is in its place again, if it has left it."""
    own: Any = layer.beneath
    if own is not None:
        device = layer.base_weight.device
        layer._modules["base_layer"] = own = own if own.weight.device == device else own.to(device)
        hold(own)
        layer.__dict__.update(beneath=None, decode=decoder(own))


def plain_dtype(quantized: Any, model_dtype: torch.dtype) -> torch.dtype:
    """What its weight is written in: 16 bits, unless the model has more."""
    computed = _computed(quantized, model_dtype)
    options = (computed, own_dtype(quantized), model_dtype)
    return next((one for one in options if one is not None and one.itemsize == 2), computed)


def dtype_of_model(root: nn.Module) -> torch.dtype:
    """Of the first of its plain weights."""
    for module in _plain_modules(root):
        for values in module._parameters.values():
            if values is not None and values.is_floating_point():
                return values.dtype
    return torch.bfloat16


def decode_others(root: nn.Module, state: dict[str, Tensor]) -> None:
    """In a state_dict without wrappers, the quantized weights that no adapter lies over become plain too."""
    model_dtype = dtype_of_model(root)
    for place in places(root):
        module = base_of(place.module.running if isinstance(place.module, Replaced) else place.module)
        if is_quantized(module):
            packed = packed_of_layer(module, place.name)
            for role in (*packed.tensors, "weight_format"):
                state.pop(f"{place.name}.{role}", None)
            state[f"{place.name}.weight"] = as_plain(module, model_dtype)


def as_plain(quantized: nn.Module, model_dtype: torch.dtype) -> Tensor:
    """Its weight as it is written where all of the model becomes plain."""
    weight = decoded_to(quantized, _computed(quantized, model_dtype))
    return weight.to(plain_dtype(quantized, model_dtype))


def held_as(layer: Adapted) -> str:
    """The codec of the quantized layer that a plain one stands in for; empty for others."""
    return "" if layer.beneath is None else codec_name(layer.beneath)


def _computed(quantized: Any, model_dtype: torch.dtype) -> torch.dtype:
    """What a checkpoint of it would be decoded to: weights of 8 bits have no dtype of their own."""
    own = own_dtype(quantized)
    found: torch.dtype = model_dtype if own is None else quantized.compute_dtype or own
    return found


def _hook_alike(made: nn.Module, like: nn.Module) -> None:
    """Whoever watches a layer watches the one in its place, and lets go of both at once."""
    made.__dict__.update({name: like.__dict__[name] for name in _HOOKS})


def _frozen(values: Tensor) -> nn.Parameter:
    return nn.Parameter(values, requires_grad=False)


def _plain_modules(root: nn.Module) -> Iterable[nn.Module]:
    yield root
    yield from (
        place.module
        for place in places(root)
        if not isinstance(place.module, Adapted | Replaced) and not is_quantized(place.module)
    )
