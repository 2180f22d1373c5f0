"""Own weight: that of a layer as the model had it before anything was merged, and its hash."""

from torch import Tensor

from surgery.core.sharded import is_sharded
from surgery.io.octets import sha256_of
from surgery.layers import Adapted
from surgery.procedures.live.in_place import undos_of


def base_sha256(layer: Adapted) -> str:
    """sha256 of the layer's base weight, without what is merged into it; kept until the weight is changed."""
    if layer.merged is not None and layer.beneath is None:
        return undos_of(layer)[0].original_sha256
    weight = own_weight(layer)
    if is_sharded(weight):  # whose memory and version are not its own
        return sha256_of(weight)
    state = weight.data_ptr(), weight._version
    if layer.hashed is None or layer.hashed[0] != state:
        layer.__dict__["hashed"] = state, sha256_of(weight)
    digest: str = layer.hashed[1]
    return digest


def own_weight(layer: Adapted) -> Tensor:
    """The parameter of the layer that the model had before anything was merged."""
    held: Tensor = layer.base_weight if layer.beneath is None else layer.beneath._parameters["weight"]  # type: ignore[assignment]
    return held
