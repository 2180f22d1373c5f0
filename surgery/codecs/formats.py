"""Format: one of FORMS, in which a merged weight is to be held."""

from typing import NamedTuple

import torch
from torch import Tensor

from surgery.codecs import FORMS
from surgery.codecs.bnb4_fresh import BLOCKSIZE
from surgery.codecs.fp8_block import BLOCK
from surgery.codecs.int_groups import GROUP, WORD
from surgery.core.codec import Codec, Headers, Packed, Settings, Shape, TiledCodec
from surgery.core.rounding import round_once
from surgery.errors import UsageError, printable

# Formats that weights are read in, and are not made in.
UNMADE_FORMS = {
    "mxfp4": "it holds stacks of experts, over which adapters are merged alone; give mxfp4a16 for linear layers",
    "fp8": "one scale for a whole weight goes with scales of inputs, which are found from data; give fp8_dynamic, "
    "fp8_block or torchao-fp8",
    **dict.fromkeys(("gptq", "awq"), "its codes are found from data; give w4a16"),
}
_TORCHAO = ("torchao-int8", "torchao-fp8")  # called as their codecs are
_GROUPED = {(4, False): "w4a16", (4, True): "w4a16-asym", (8, False): "w8a16"}  # by bits, and zero points
_HALVES = (torch.bfloat16, torch.float16)  # of fp8's scales by rows; those that others than compressed-tensors wrote
# are in float32


class Format(NamedTuple):
    """A codec with the settings of fresh scales."""

    codec: TiledCodec
    settings: Settings

    def holds(self, packed: Packed) -> bool:
        """Is `packed` of this codec and kind? However its scales are held."""
        kind = "quant_type"
        return self.codec.claims(packed.headers) and packed.settings.get(kind) == self.settings.get(kind)

    def fresh(self, exact: Tensor, dtype: torch.dtype) -> Packed:
        """An exact weight (float64), rounded once to `dtype` and held so."""
        return self.codec.fresh(round_once(exact, dtype), self.settings)


def form_of(codec: Codec, headers: Headers, settings: Settings, shape: Shape) -> str | None:
    """The one of FORMS that a weight of this shape is held in, if it is one."""
    found = ""
    if codec.name == "bnb4" and settings["blocksize"] == BLOCKSIZE:
        found = f"{settings['quant_type']}{'-double' * ('weight.nested_absmax' in headers)}"
    elif codec.name == "pack-quantized" and _in_groups(headers, shape, settings["num_bits"]):
        found = _GROUPED.get((settings["num_bits"], "weight_zero_point" in headers), "")
    elif codec.name == "int-quantized" and _by_rows(headers, shape) and "weight_zero_point" not in headers:
        found = "w8a8" if settings["num_bits"] == 8 else ""
    elif codec.name == "fp8_block" and _in_blocks(headers, shape):
        found = "fp8_block"
    elif codec.name == "fp8_block" and _by_rows(headers, shape) and headers["weight_scale"][0] in _HALVES:
        found = "fp8_dynamic"
    elif codec.name == "bnb8":
        found = "int8"
    elif codec.name == "nvfp4-pack-quantized" and "input_global_scale" not in headers:
        found = "nvfp4"
    elif codec.name == "mxfp4-pack-quantized":
        found = "mxfp4a16"
    elif codec.name in _TORCHAO and headers["scale"][1] == (shape[0], 1):
        found = codec.name
    return found or None


def _in_blocks(headers: Headers, shape: Shape) -> bool:
    """By the form's own blocks, with scales in float32."""
    wanted = tuple(-(-extent // block) for extent, block in zip(shape, BLOCK, strict=True))
    codes, scales = (headers.get(role) for role in ("weight", "weight_scale_inv"))
    return scales == (torch.float32, wanted) and codes is not None and codes[0] == torch.float8_e4m3fn


def _in_groups(headers: Headers, shape: Shape, bits: int) -> bool:
    """By the forms' own groups."""
    (_, words), (_, scales) = headers["weight_packed"], headers["weight_scale"]
    return words[1] == -(-shape[1] * bits // WORD) and scales == (shape[0], shape[1] // GROUP)


def _by_rows(headers: Headers, shape: Shape) -> bool:
    return headers.get("weight_scale", (None, ()))[1] == (shape[0], 1)


def format_of(name: str, where: str) -> Format:
    """UsageError for a name that is none, with the next step where it is that of another format."""
    if not isinstance(name, str):
        raise UsageError(f"{where}: {printable(repr(name))} is no name of a format")
    if name in UNMADE_FORMS:
        raise UsageError(f"{where}: {name!r}: {UNMADE_FORMS[name]}")
    if name not in FORMS:
        raise UsageError(f"{where}: {printable(name)!r}; one of {', '.join(FORMS)} is wanted")
    return Format(*FORMS[name])
