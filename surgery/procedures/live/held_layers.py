"""Held layers: those of a live model whose merged weights go into a format, or keep that of their base."""

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace
from importlib import import_module

import torch
from torch import Tensor, nn

from surgery.codecs import FORMS, codec_of, cut
from surgery.codecs.formats import format_of
from surgery.core.codec import Packed
from surgery.core.sharded import is_sharded
from surgery.core.site import Site
from surgery.core.survival import Bounds, Survival
from surgery.errors import EnvironmentFault, MatchError, StateError, UsageError, ValueRangeError, printable
from surgery.hosts.change import Change, MergedTile, Watch
from surgery.hosts.encoded import Encoded, held_in, reheld
from surgery.hosts.model import LiveWeights
from surgery.hosts.quantized import compute_dtype, is_quantized, layer_of, packed_of_layer
from surgery.hosts.views import Merged
from surgery.layers import Adapted
from surgery.procedures.live.quantize import HEAD
from surgery.procedures.planning.feeding import fed
from surgery.procedures.planning.treatment import LIVE_FORMS, Treatment
from surgery.procedures.writing.surviving import refuse_lost

_LIBRARIES = {"bnb4": "bitsandbytes", "bnb8": "bitsandbytes", "fp8_block": "transformers.integrations.finegrained_fp8"}
_HALVES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Landing:
    """Where the weights of a live merge go; `heads` are output heads, which go into no format."""

    treatment: Treatment = field(default_factory=Treatment)
    bounds: Bounds = field(default_factory=Bounds)
    heads: Collection[str] = ()

    def layers(self, layers: Mapping[str, Adapted]) -> dict[str, Adapted]:
        """Those that it holds in a format. Raises UsageError, MatchError, StateError, EnvironmentFault."""
        into = self.treatment.into
        if into in {None, "16bit"}:
            return {}
        if into == "keep":
            return {name: layer for name, layer in layers.items() if is_quantized(layer.base_layer)}
        assert into is not None
        if into not in LIVE_FORMS:
            raise UsageError(
                f"merge: no layer in memory holds {into}; one of {', '.join(LIVE_FORMS)} is wanted, or save the "
                f"adapter and merge_checkpoint(..., into={into!r}) it, or surgery merge --into {into}"
            )
        _import(_LIBRARIES[FORMS[into][0].name], into)
        found = {name: layer for name, layer in layers.items() if self._holds(name, layer, into)}
        if not found:
            raise MatchError(f"merge into {into}: no adapted layer is an nn.Linear that it could hold; give no into")
        return found

    def made(self, layers: Mapping[str, Adapted], changes: Mapping[str, tuple[Change, ...]]) -> dict[str, nn.Module]:
        """By name, the layer that takes the place of each base. CheckError where too little of the changes is left."""
        told: dict[str, Survival] = {}
        if self.treatment.calibration is not None:
            self.treatment.calibration.refuse_other(list(layers))
        found = {name: self._made(layer, changes[name], told) for name, layer in layers.items()}
        if found:
            step = "give `into=16bit`, or `min_retained` and `max_noise`"
            refuse_lost(told, self.bounds, f"merge into {self.treatment.into}", step)
        return found

    def _holds(self, name: str, layer: Adapted, into: str) -> bool:
        if name in self.heads or name.rpartition(".")[2] == HEAD:
            return False
        if is_quantized(layer.base_layer) and format_of(into, name).holds(packed_of_layer(layer.base_layer, name)):
            raise UsageError(f'{printable(name)}: it is held in {into} already; give into="keep", or "16bit"')
        if is_sharded(layer.base_weight):
            raise StateError(
                f"{printable(name)}: each process holds a share of it; merge into {into} before it is cut up"
            )
        return type(layer.base_layer) is nn.Linear or is_quantized(layer.base_layer)

    def _made(self, layer: Adapted, changes: tuple[Change, ...], told: dict[str, Survival]) -> nn.Module:
        weight, *biases = changes

        def watch(tile: MergedTile) -> None:
            name, survival = tile.change.site.weight.name, tile.survival
            if survival is not None:
                told[name] = told.get(name, Survival()).plus(survival)

        land = self._kept if self.treatment.into == "keep" else self._anew
        made = land(layer, weight, watch)
        for one in biases:
            made.bias = nn.Parameter(_merged_bias(layer, one), requires_grad=False)
        return made

    def _fed(self, change: Change) -> Change:
        return fed(change, self.treatment.calibration, change.site.name) if self.treatment.rounding else change

    def _kept(self, layer: Adapted, change: Change, watch: Watch) -> nn.Module:
        """By its own scales."""
        packed, base = packed_of_layer(layer.base_layer, change.site.name), layer.base_layer
        codec = codec_of(packed, "")
        weight = change.site.weight._replace(dtype=torch.float32)  # what codes and scales are multiplied in
        together = codec.step(packed.headers, packed.settings)
        site = replace(change.site, tensors={**change.site.tensors, "weight": weight}, together=together)
        change = replace(change, site=site, dtype=torch.float32, held=codec.name, keep=True)
        change = self._fed(change)
        outcome = reheld(Merged(_Held(packed, site), [change], watch), change, packed)
        return layer_of(outcome, base, compute_dtype(base))

    def _anew(self, layer: Adapted, change: Change, watch: Watch) -> nn.Module:
        """By scales of its own."""
        assert self.treatment.into is not None
        if change.dtype not in _HALVES:
            dtype = str(change.dtype).removeprefix("torch.")
            raise ValueRangeError(
                f"{printable(change.site.name)}: it is in {dtype}, which no format is made from; cast it"
            )
        change = self._fed(held_in(change, self.treatment.into))
        source = LiveWeights({change.site.name: layer.base_weight}, [change.site])
        outcome = Encoded(source, [change], watch).encoded(change)
        return layer_of(outcome, layer.base_layer, change.dtype)


class _Held:
    """One quantized layer as a source."""

    def __init__(self, packed: Packed, site: Site) -> None:
        self.packed, self.site = packed, site

    def sites(self) -> Iterable[Site]:
        return [self.site]

    def load(self, site: Site, rows: slice | None = None) -> Packed:
        return cut(codec_of(self.packed, ""), self.packed, site.rows(rows))


def _merged_bias(layer: Adapted, change: Change) -> Tensor:
    bias = layer.base_layer.bias
    assert isinstance(bias, Tensor)
    source = _Beside({change.site.name: bias}, layer)
    return Merged(source, [change]).load(change.site).tensors["weight"]


class _Beside(LiveWeights):
    """The bias of a layer, and the layer's weight for what depends on that."""

    def __init__(self, biases: Mapping[str, Tensor], layer: Adapted) -> None:
        super().__init__(biases, [])
        self.layer = layer

    def load(self, site: Site, rows: slice | None = None) -> Packed:
        if site.name in self.parameters:
            return super().load(site, rows)
        if is_quantized(self.layer.base_layer):
            return _Held(packed_of_layer(self.layer.base_layer, site.name), site).load(site, rows)
        return LiveWeights({site.name: self.layer.base_weight}, [site]).load(site, rows)


def _import(library: str, into: str) -> None:
    """What holds such layers. EnvironmentFault where it is missing or broken."""
    try:
        import_module(library)
    except (ImportError, OSError, RuntimeError) as error:
        name = library.partition(".")[0]
        raise EnvironmentFault(f"merge into {into}: {name} is missing or broken; pip install {name}") from error
