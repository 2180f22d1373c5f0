"""How a weight is held; one file a codec, asked in this order."""

from collections.abc import Mapping
from functools import lru_cache

import torch
from torch import Tensor

from surgery.codecs.bnb4 import Bnb4
from surgery.codecs.bnb8 import Bnb8
from surgery.codecs.compressed_ints import IntQuantized, PackQuantized
from surgery.codecs.fp8_block import Fp8Block
from surgery.codecs.fp8_rows import Fp8Rows
from surgery.codecs.mxfp4 import Mxfp4
from surgery.codecs.mxfp4_packed import Mxfp4Packed
from surgery.codecs.nvfp4 import Nvfp4
from surgery.codecs.plain import Plain
from surgery.codecs.torchao import TorchaoFp8, TorchaoInt8
from surgery.core.codec import Codec, Packed, Settings, Shape, TiledCodec
from surgery.errors import FormatError

CODECS: tuple[Codec, ...] = (
    *(Bnb4(), Bnb8(), Fp8Block(), Mxfp4()),
    *(PackQuantized(), IntQuantized(), Nvfp4(), Mxfp4Packed()),
    *(TorchaoInt8(), TorchaoFp8()),
    Plain(),
)
# Formats by name, with the settings of fresh weights in them.
FORMS: Mapping[str, tuple[TiledCodec, Settings]] = {
    "nf4": (Bnb4(), {"quant_type": "nf4"}),
    "nf4-double": (Bnb4(), {"quant_type": "nf4", "double_quant": True}),
    "fp4": (Bnb4(), {"quant_type": "fp4"}),
    "fp4-double": (Bnb4(), {"quant_type": "fp4", "double_quant": True}),
    "int8": (Bnb8(), {}),
    "fp8_block": (Fp8Block(), {}),
    "w4a16": (PackQuantized(), {"num_bits": 4, "group_size": 128}),
    "w4a16-asym": (PackQuantized(), {"num_bits": 4, "group_size": 128, "symmetric": False}),
    "w8a16": (PackQuantized(), {"num_bits": 8, "group_size": 128}),
    "w8a8": (IntQuantized(), {}),
    "fp8_dynamic": (Fp8Rows(), {}),
    "nvfp4": (Nvfp4(), {}),
    "mxfp4a16": (Mxfp4Packed(), {}),
    "torchao-int8": (TorchaoInt8(), {}),
    "torchao-fp8": (TorchaoFp8(), {}),
}


def codec_of(packed: Packed, where: str) -> Codec:
    """The codec that claims `packed`. FormatError, naming `where`, if none does."""
    headers = packed.headers
    codec = _claiming(tuple(headers.items()))
    if codec is not None:
        return codec
    held = ", ".join(f"{role} {str(dtype).removeprefix('torch.')}" for role, (dtype, _) in headers.items())
    raise FormatError(f"{where}: held as {held}; float64, float32, bfloat16 or float16 is wanted; dequantize it first")


def cut(codec: Codec, packed: Packed, rows: slice) -> Packed:
    """Of whole tensors, no more than what `rows` of the weight need."""
    spans = codec.spans(packed.headers, packed.settings, rows)
    tensors = {role: values[spans[role]] if role in spans else values for role, values in packed.tensors.items()}
    return packed._replace(tensors=tensors, rows=rows)


def packed_of(tensors: Mapping[str, Tensor], where: str, config: Settings | None = None) -> Packed:
    """Whole tensors, by role, with their settings; `config` is the quantization_config of the model, if it has one.

    FormatError, naming `where`, if no codec claims them, or they contradict each other.
    """
    packed = Packed(tensors)
    codec = codec_of(packed, where)
    try:
        return packed._replace(settings=codec.read(packed.headers, config or {}, tensors.__getitem__))
    except FormatError as error:
        raise FormatError(f"{where}: {error}") from error


@lru_cache
def _claiming(headers: tuple[tuple[str, tuple[torch.dtype, Shape]], ...]) -> Codec | None:
    """The first codec that claims them. Kept: it is asked for each tile, and all tiles of a weight are alike."""
    told = dict(headers)
    return next((codec for codec in CODECS if codec.claims(told)), None)
