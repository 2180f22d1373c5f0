"""Quantized layers of a live model: how each holds its weight, as the codecs read it."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from surgery.codecs import codec_of, packed_of
from surgery.core.codec import Packed
from surgery.errors import StateError, printable
from surgery.hosts.bitsandbytes_layers import BitsandbytesLayers
from surgery.hosts.fp8_layers import Fp8Layers


class Kind(Protocol):
    """One library's quantized linear layers."""

    @property
    def codecs(self) -> tuple[str, ...]:
        """Those by which it holds weights."""
        ...

    def classes(self) -> tuple[type[nn.Module], ...]:
        """Of its layers; none where the library is not imported."""
        ...

    def unready(self, module: Any) -> str | None:
        """Why such a layer cannot bear an adapter as it is, and the next step; None if it can."""
        ...

    def tensors(self, module: Any) -> Mapping[str, Tensor]:
        """What holds the weight of one that is ready, named as a file names it."""
        ...

    def settings(self, module: Any) -> Mapping[str, Any]:
        """What a quantization_config would say of it, beside."""
        ...

    def shape(self, module: Any) -> tuple[int, int]:
        """(out, in) of the weight, whatever the shape of its codes."""
        ...

    def compute_dtype(self, module: Any) -> torch.dtype:
        """What its weight is decoded to when it runs."""
        ...

    def made(self, packed: Packed, like: Any, dtype: torch.dtype) -> nn.Module:
        """A layer that holds `packed`, with the bias, sizes and device of `like`, and its settings if it is one too.

        `dtype` is what it computes in, where that is its own to say.
        """
        ...

    def hold(self, module: Any) -> None:
        """Let it run under adapters, with its bytes as they are."""
        ...

    def release(self, module: Any) -> None:
        """It is as before `hold`."""
        ...


KINDS: tuple[Kind, ...] = (BitsandbytesLayers(), Fp8Layers())


def quantized_kinds() -> Iterator[type[nn.Module]]:
    """The classes of quantized linear layers, of the libraries that are imported."""
    for kind in KINDS:
        yield from kind.classes()


def is_quantized(module: nn.Module) -> bool:
    return _kind(module) is not None


def unready(module: Any) -> str | None:
    """Why a quantized layer cannot bear an adapter as it is, and the next step; None if it can."""
    return _of(module).unready(module)


def packed_of_layer(module: Any, where: str = "") -> Packed:
    """The tensors that hold its weight, named as a file names them. StateError where `unready` has something to say."""
    kind = _of(module)
    why = kind.unready(module)
    if why is not None:
        raise StateError(f"{printable(where)}: {why}")
    return packed_of(kind.tensors(module), printable(where), kind.settings(module))


def shape_of_layer(module: Any) -> tuple[int, int]:
    """(out, in) of the weight, whatever the shape of its codes."""
    return _of(module).shape(module)


def compute_dtype(module: Any) -> torch.dtype:
    """What its weight is decoded to when it runs."""
    return _of(module).compute_dtype(module)


def own_dtype(module: Any) -> torch.dtype | None:
    """What its weight was in before it was quantized; None where nothing tells."""
    packed = packed_of_layer(module)
    return codec_of(packed, "").dtype(packed.settings)


def codec_name(module: nn.Module) -> str:
    return codec_of(packed_of_layer(module), "").name


def decoded_to(module: nn.Module, dtype: torch.dtype) -> Tensor:
    """Its weight [out, in]."""
    packed = packed_of_layer(module)
    return codec_of(packed, "").decode(packed, dtype)


def decoded(module: nn.Module) -> Tensor:
    """The same in the dtype that it computes with."""
    return decoded_to(module, compute_dtype(module))


def decoder(module: nn.Module) -> Callable[[nn.Module], Tensor] | None:
    """What gives the weight of a module that holds it otherwise than plainly."""
    return decoded if is_quantized(module) else None


def layer_of(packed: Packed, like: nn.Module, dtype: torch.dtype) -> nn.Module:
    """A library's own layer that holds `packed`, and is as `like` otherwise; `dtype` is what it computes in."""
    codec = codec_of(packed, "").name
    made = next(kind for kind in KINDS if codec in kind.codecs).made(packed, like, dtype)
    hold(made)
    return made


def hold(module: nn.Module) -> None:
    """Let a quantized layer run under adapters, with its bytes as they are."""
    kind = _kind(module)
    if kind is not None:
        kind.hold(module)


def release(module: nn.Module) -> None:
    """It is as before `hold`."""
    kind = _kind(module)
    if kind is not None:
        kind.release(module)


def _kind(module: nn.Module) -> Kind | None:
    if type(module) is nn.Linear:
        return None
    return next((kind for kind in KINDS if isinstance(module, kind.classes())), None)


def _of(module: nn.Module) -> Kind:
    kind = _kind(module)
    assert kind is not None
    return kind
