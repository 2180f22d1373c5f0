"""A twin of a live model: its modules without wrappers, over other tensors than its own."""

import copy
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from surgery.errors import StateError, printable
from surgery.hosts.quantized import decoded_to, decoder, is_quantized, shape_of_layer
from surgery.hosts.tree import places, set_state, state_of
from surgery.layers import Adapted, Replaced
from surgery.layers.trained_bias import forget_beside

Made = Callable[[Tensor], Tensor]
Decoded = Callable[[nn.Module], Tensor]  # the weight of a quantized layer
_HALVES = (torch.bfloat16, torch.float16)


class Weightless(NamedTuple):
    """A model of fake parameters, and the mode they are of: it can be traced, and nothing can be computed with it."""

    module: nn.Module
    mode: Any


def weightless(root: nn.Module) -> Weightless:
    """A twin whose parameters have no memory, and buffers are as they are; its halves are float32."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    mode = FakeTensorMode(allow_non_fake_inputs=True)

    def fake(held: Tensor) -> Tensor:
        with mode:
            return torch.empty(held.shape, dtype=computed(held.dtype))

    return Weightless(_copied(root, _Twin(fake, as_computed, _shaped), _modules(root)), mode)


def computed(dtype: torch.dtype) -> torch.dtype:
    """What a tensor of `dtype` is computed in."""
    return torch.float32 if dtype in _HALVES else dtype


def as_stored(held: Tensor) -> Tensor:
    """On the CPU: a parameter's own memory, for no run changes it, and a copy of a buffer."""
    return held.detach().to("cpu", copy=not isinstance(held, nn.Parameter))


def as_computed(held: Tensor) -> Tensor:
    """The same, of halves in float32."""
    return as_stored(held).to(computed(held.dtype))


def doubled(held: Tensor) -> Tensor:
    """A copy on the CPU, of floats in float64."""
    return held.detach().to("cpu", torch.float64 if held.is_floating_point() else None, copy=True)


def exactly(quantized: nn.Module) -> Tensor:
    """The weight of a quantized layer in float32, to which none is rounded."""
    return decoded_to(quantized, torch.float32)


def twin(root: nn.Module, made: Made, decoded: Decoded = exactly) -> nn.Module:
    """A copy without adapters, in `eval` mode, of the tensors that `made` makes of the root's.

    Of a module of `modules_to_save` it has the running copy, and in the place of a quantized linear layer a plain one,
    of the weight that `decoded` gives. StateError for a model that cannot be copied.
    """
    return _copied(root, _Twin(made, made, decoded), _modules(root))


def adapted_twin(root: nn.Module, made: Made) -> nn.Module:
    """The same with its adapters. Where tensors are as they are stored, quantized ones are in the others' dtype."""
    dtype = _floats(root) if made is as_stored else torch.float32
    return _copied(root, _Twin(made, made, partial(decoded_to, dtype=dtype)), [])


class _Twin(NamedTuple):
    """What its tensors are made by."""

    parameter: Made
    buffer: Made
    decoded: Decoded

    def plain(self, quantized: Any, memo: Mapping[int, Any]) -> nn.Linear:
        made = nn.Linear(quantized.in_features, quantized.out_features, bias=False, device="meta")
        made.weight = nn.Parameter(self.parameter(self.decoded(quantized)), requires_grad=False)
        made.register_parameter("bias", None if quantized.bias is None else memo[id(quantized.bias)])
        return made


def _floats(root: nn.Module) -> torch.dtype:
    """What the model is in."""
    return next((one.dtype for one in root.parameters() if one.is_floating_point()), torch.float32)


def _shaped(module: nn.Module) -> Tensor:
    return torch.empty(shape_of_layer(module), device="meta")


def _modules(root: nn.Module) -> list[nn.Module]:
    return [place.module for place in places(root)]


def _copied(root: nn.Module, how: _Twin, removed: Sequence[nn.Module]) -> nn.Module:
    """`removed` are the modules of which none is to be a wrapper."""
    quantized = [module for module in root.modules() if is_quantized(module)]
    codes = {id(module.weight) for module in quantized}
    memo: dict[int, Any] = {}
    for held in root.parameters():
        if id(held) not in codes:
            memo[id(held)] = nn.Parameter(how.parameter(held), requires_grad=False)
    for buffer in root.buffers():
        memo[id(buffer)] = how.buffer(buffer)
    memo |= {id(module): how.plain(module, memo) for module in quantized}
    if removed and (state := state_of(root)) is not None:
        memo[id(state)] = None
    try:
        for module in reversed(removed):  # what lies within a wrapper comes before it
            if isinstance(module, Adapted | Replaced) and id(module) not in memo:
                memo[id(module)] = copy.deepcopy(_inner(module), memo)
        found = copy.deepcopy(root, memo)
    except (TypeError, RuntimeError, copy.Error) as error:
        raise StateError(
            f"a {type(root).__name__}: it cannot be copied ({printable(error)}); a model whose attributes "
            "copy.deepcopy takes is wanted"
        ) from error
    if removed:
        set_state(found, None)
        for module in found.modules():
            forget_beside(module)
    for module in found.modules() if quantized else ():
        if isinstance(module, Adapted):
            module.__dict__["decode"] = decoder(module.base_layer)
    return found.eval()


def aliases(root: nn.Module) -> dict[str, tuple[str, ...]]:
    """Of each name of a parameter or buffer, all names of the same memory."""
    names: dict[int, list[str]] = {}
    for held in (root.named_parameters, root.named_buffers):
        for name, values in held(remove_duplicate=False):
            names.setdefault(id(values), []).append(name)
    return {name: tuple(group) for group in names.values() for name in group}


def _inner(wrapper: nn.Module) -> nn.Module:
    inner = wrapper.running if isinstance(wrapper, Replaced) else wrapper.base_layer
    assert isinstance(inner, nn.Module)
    return inner
