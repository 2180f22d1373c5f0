"""Kept: the weights of a checkpoint that a graph is to hold as bitsandbytes does, and what they lack in the files."""

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from surgery.codecs import FORMS
from surgery.codecs.bnb4 import Bnb4
from surgery.codecs.bnb4_fresh import KINDS
from surgery.codecs.bnb8 import Bnb8
from surgery.core.site import TensorInfo
from surgery.errors import FormatError, printable
from surgery.formats.onnx.quantized import BLOCKS, EightBits, FourBits, Quantized
from surgery.formats.onnx.stored import Stored
from surgery.hosts.checkpoint import Checkpoint
from surgery.hosts.packing import Held
from surgery.io.lazy import Lazy
from surgery.procedures.exports.stored_tensors import read_tensor

_ABSMAX = "weight.absmax"


class Kept(NamedTuple):
    """A weight whose codes a graph points to."""

    held: Held
    scales: str  # the tensor that they are in
    made: Lazy | None  # it, where it is yet to be written
    values: tuple[float, ...] = ()  # of the 16 codes

    @property
    def codes(self) -> str:
        return self.held.tensors["weight"].name

    def nodes(self, stored: Mapping[str, Stored], portable: bool) -> Quantized:
        """In a graph over the tensors that are `stored`."""
        codes, scales, shape = stored[self.codes], stored[self.scales], self.held.plain.shape
        if not self.values:
            return EightBits(shape, codes, scales)
        kind, blocksize = self.held.settings["quant_type"], self.held.settings["blocksize"]
        own = self.values == tuple(torch.tensor(KINDS[kind]).tolist())
        native = own and blocksize in BLOCKS and not portable
        return FourBits(shape, codes, scales, kind, blocksize, self.values, native)


def kept_weights(files: Checkpoint) -> dict[str, Kept]:
    """By the name of the plain weight. FormatError for what is held otherwise."""
    return {name: _kept(files, held) for name, held in files.packed.items()}


def refuse_kept(held: Mapping[str, Held]) -> None:
    """FormatError for a weight that no node decodes."""
    for name, one in held.items():
        if one.codec.name not in _KEPT or len(one.plain.shape) != 2:
            raise FormatError(
                f"{printable(name)}: held as {one.codec.name} {list(one.plain.shape)}; matrices in 4 or 8 bits of "
                "bitsandbytes have nodes that decode them; export it into 16bit"
            )


def has_nodes(form: str) -> bool:
    """Are there nodes that decode what goes into the form?"""
    return FORMS[form][0].name in _KEPT


def is_of_bitsandbytes(files: Checkpoint) -> bool:
    """Is it quantized, and by bitsandbytes alone?"""
    return bool(files.packed) and all(one.codec.name in _KEPT for one in files.packed.values())


def _kept(files: Checkpoint, held: Held) -> Kept:
    refuse_kept({held.plain.name: held})
    return _KEPT[held.codec.name](files, held)


def _in_eight_bits(files: Checkpoint, held: Held) -> Kept:  # noqa: ARG001  # as for four
    return Kept(held, held.tensors["SCB"].name, None)


def _in_four_bits(files: Checkpoint, held: Held) -> Kept:
    values = tuple(read_tensor(files, held.tensors["weight.quant_map"].name).tolist())
    absmax = held.tensors[_ABSMAX]
    if absmax.dtype == torch.float32 and len(absmax.shape) == 1:
        return Kept(held, absmax.name, None, values)
    blocks = -(-math.prod(held.plain.shape) // held.settings["blocksize"])
    info = TensorInfo(f"{absmax.name}.float32", torch.float32, (blocks,))
    return Kept(held, info.name, Lazy(info, partial(_absmax, files, held)), values)


def _absmax(files: Checkpoint, held: Held) -> Tensor:
    return Bnb4().absmax(held.load(None, lambda info, _: read_tensor(files, info.name)))


# By the name of the codec: how its weights are kept.
_KEPT: Mapping[str, Callable[[Checkpoint, Held], Kept]] = {Bnb4.name: _in_four_bits, Bnb8.name: _in_eight_bits}
