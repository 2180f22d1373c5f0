"""Packing: the weights of a checkpoint that several of its tensors hold together, by the codecs' endings."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from surgery.codecs import CODECS
from surgery.codecs.formats import form_of
from surgery.codecs.plain import PLAIN_DTYPES
from surgery.core.codec import Codec, Headers, Packed, Settings
from surgery.core.site import RawDtype, TensorInfo
from surgery.errors import FormatError, printable

Load = Callable[[TensorInfo, slice | None], Tensor]  # a tensor of the files, or some rows of its first axis

_HELD = {codec: tuple(codec.endings.values()) for codec in CODECS if codec.name != "plain"}
# What a tensor's name ends in that means nothing without others.
BESIDE = tuple({ending for codec, endings in _HELD.items() for ending in endings} - {".weight"})


@dataclass(frozen=True)
class Held:
    """A weight as its codec has it in the files, and the plain tensor that would hold it."""

    codec: Codec
    tensors: Mapping[str, TensorInfo]  # by role
    settings: Settings
    plain: TensorInfo  # in the dtype to compute with

    @property
    def headers(self) -> Headers:
        return _headers(self.tensors)

    @property
    def first(self) -> TensorInfo:
        """In whose place the plain tensor stands."""
        return self.tensors[next(role for role in self.codec.endings if role in self.tensors)]

    @property
    def form(self) -> str | None:
        """The one of FORMS that it is held in, if it is one."""
        return form_of(self.codec, self.headers, self.settings, self.plain.shape)

    def by_output(self) -> "Held":
        """A stack whose codes lie as [stack, out, ...], its matrices one below another."""
        flat = {
            role: one._replace(shape=(one.shape[0] * one.shape[1], *one.shape[2:]))
            for role, one in self.tensors.items()
        }
        return replace(self, tensors=flat)

    def load(self, rows: slice | None, load: Load) -> Packed:
        spans = {} if rows is None else self.codec.spans(self.headers, self.settings, rows)
        return Packed({role: load(one, spans.get(role)) for role, one in self.tensors.items()}, self.settings, rows)


def quantization_of(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """What config.json says of how weights are held; empty if nothing."""
    inner = [value for value in config.values() if isinstance(value, dict)]
    told = (one.get("quantization_config") for one in (config, *inner))
    return next((one for one in told if isinstance(one, dict)), {})


def torch_dtype_of(info: TensorInfo) -> torch.dtype:
    """To read with: bytes where torch has no such dtype, and it is of 8 bits."""
    return torch.uint8 if isinstance(info.dtype, RawDtype) and info.dtype.bits == 8 else info.torch_dtype


def packings(infos: Iterable[TensorInfo], config: Mapping[str, Any], load: Load) -> dict[str, Held]:
    """By the name of the plain tensor. FormatError where the tensors of a weight contradict each other."""
    by_name = {info.name: info for info in infos}
    marked = [name for name in by_name if name.endswith(BESIDE)]
    found: dict[str, Held] = {}
    for codec, endings in _HELD.items():
        stems = {name.removesuffix(end) for name in marked for end in endings[1:] if name.endswith(end)}
        for stem in sorted(stems):
            there = {role: by_name[stem + end] for role, end in codec.endings.items() if stem + end in by_name}
            if stem + codec.plain_ending not in found and codec.claims(_headers(there)):
                held = _held(codec, there, stem + codec.plain_ending, config, load)
                found[held.plain.name] = held
    return found


def model_dtype(config: Mapping[str, Any]) -> torch.dtype | None:
    """What config.json says that the weights are in."""
    inner = [value for value in config.values() if isinstance(value, dict)]
    told = (one.get(key) for one in (config, *inner) for key in ("dtype", "torch_dtype"))
    return next((dtype for one in told if (dtype := _named(one)) is not None), None)


def _held(codec: Codec, tensors: Mapping[str, TensorInfo], plain: str, config: Mapping[str, Any], load: Load) -> Held:
    headers = _headers(tensors)
    try:
        settings = codec.read(headers, quantization_of(config), lambda role: load(tensors[role], None))
    except FormatError as error:
        raise FormatError(f"{printable(plain)}: {error}") from error
    dtype = _named(quantization_of(config).get("bnb_4bit_compute_dtype")) if codec.name == "bnb4" else None
    dtype = dtype or codec.dtype(settings) or model_dtype(config) or torch.bfloat16
    return Held(codec, tensors, settings, TensorInfo(plain, dtype, codec.shape(headers, settings)))


def _headers(tensors: Mapping[str, TensorInfo]) -> Headers:
    readable = {
        role: one for role, one in tensors.items() if not isinstance(one.dtype, RawDtype) or one.dtype.bits == 8
    }
    return {role: (torch_dtype_of(one), one.shape) for role, one in readable.items()}


def _named(name: object) -> torch.dtype | None:
    known = {str(dtype).removeprefix("torch."): dtype for dtype in PLAIN_DTYPES}
    return known.get(name) if isinstance(name, str) else None
