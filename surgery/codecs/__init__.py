"""How a weight is held; one file a codec, asked in this order."""

from surgery.codecs.plain import Plain
from surgery.core.codec import Codec

CODECS: tuple[Codec, ...] = (Plain(),)
