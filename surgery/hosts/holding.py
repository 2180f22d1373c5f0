"""Holding: what becomes of a live layer's merged weight in a format, with scales of its own or those that it has."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from surgery.codecs import codec_of
from surgery.codecs.formats import Format
from surgery.core.op import Op
from surgery.errors import InputError, MatchError, UsageError, printable
from surgery.hosts.model import stored_weight
from surgery.hosts.quantized import compute_dtype, is_quantized, packed_of_layer
from surgery.layers.aware import Holding

# What becomes of the weight of a layer, by its op and name; None: nothing but a merge.
Awareness = Callable[[nn.Module, Op, str], Holding | None]


@dataclass(frozen=True)
class Fresh:
    """Scales are found anew: the merged weight is rounded to the dtype of the base's, and then quantized."""

    form: Format
    op: Op

    def begin(self, base_layer: nn.Module) -> Tensor:
        return stored_weight(base_layer, self.op).to(torch.float64)

    def end(self, base_layer: nn.Module, laid: Tensor) -> Tensor:
        dtype = compute_dtype(base_layer) if is_quantized(base_layer) else stored_weight(base_layer, self.op).dtype
        return self.form.codec.decode(self.form.fresh(laid, dtype), dtype)


@dataclass(frozen=True)
class Kept:
    """The base is held so already: its scales stay, and its codes where the value is unchanged."""

    def begin(self, base_layer: nn.Module) -> Tensor:
        packed = packed_of_layer(base_layer)
        return codec_of(packed, "").decode(packed, torch.float64)

    def end(self, base_layer: nn.Module, laid: Tensor) -> Tensor:
        packed = packed_of_layer(base_layer)
        codec = codec_of(packed, "")
        return codec.decode(codec.encode(laid, like=packed), compute_dtype(base_layer))


def holding_of(form: Format, base_layer: nn.Module, op: Op, where: str) -> Holding:
    """For a layer that is a site. MatchError for a weight that the format cannot hold."""
    kept = is_quantized(base_layer) and form.holds(packed_of_layer(base_layer, where))
    return refuse_unheld(Kept() if kept else Fresh(form, op), base_layer, where)


def refuse_unheld(found: Holding, base_layer: nn.Module, where: str) -> Holding:
    """The same. MatchError where it cannot hold the layer's weight."""
    try:
        found.end(base_layer, found.begin(base_layer))
    except (InputError, UsageError) as error:
        raise MatchError(f"{printable(where)}: {error}, or exclude it") from error
    return found
