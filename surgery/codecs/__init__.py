"""How a weight is held; one file a codec, asked in this order."""

from surgery.codecs.plain import Plain
from surgery.core.codec import Codec, Packed
from surgery.errors import FormatError

CODECS: tuple[Codec, ...] = (Plain(),)


def codec_of(packed: Packed, where: str) -> Codec:
    """The codec that claims `packed`. FormatError, naming `where`, if none does."""
    headers = {role: (values.dtype, tuple(values.shape)) for role, values in packed.tensors.items()}
    for codec in CODECS:
        if codec.claims(headers):
            return codec
    held = ", ".join(f"{role} {str(dtype).removeprefix('torch.')}" for role, (dtype, _) in headers.items())
    raise FormatError(f"{where}: held as {held}; float64, float32, bfloat16 or float16 is wanted; dequantize it first")
