"""In place: weights of a live model that become what is merged, and come back to the bit by a record of each."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from torch import Tensor

from surgery.core.sharded import is_sharded
from surgery.core.source import copy
from surgery.core.undo import Recorder
from surgery.core.workers import default_workers, in_order
from surgery.errors import StateError, printable
from surgery.hosts.change import Change, MergedTile
from surgery.hosts.model import LiveWeights
from surgery.hosts.unmerged import Undo, Unmerged, kept_whole
from surgery.hosts.views import Merged
from surgery.io.octets import sha256_of
from surgery.layers import Adapted
from surgery.procedures.live.changes import Changes, parameter_of

UndoKind = Literal["index", "copy"]


@dataclass(frozen=True)
class LiveUndo:
    """What brings one weight back: the change with its own clone of the factors, the record, both hashes."""

    change: Change
    undo: Undo
    original_sha256: str
    merged_sha256: str


class LiveRecorder:
    """A watch that makes the record of each weight as it is merged."""

    def __init__(self, live: LiveWeights, kind: UndoKind) -> None:
        self.live, self.kind = live, kind
        self.recorder: Recorder | None = None
        self.undos: dict[str, Undo] = {}
        self.told: dict[str, Change] = {}  # as the tiles were merged, with all that the layers had to know

    def __call__(self, tile: MergedTile) -> None:
        if tile.change.held:  # whose layer is put back as it was
            return
        if tile.first:
            by_index = self.kind == "index" and tile.steps is not None and tile.change.beside is None
            self.recorder = Recorder() if by_index else None
        if self.recorder is not None and tile.steps is not None and tile.original is not None:
            self.recorder.add(tile.original, tile.merged, tile.steps, tile.near_ties)
        if tile.last:
            self._end(tile.change)

    def _end(self, change: Change) -> None:
        name, weight = change.site.name, self.live.weight(change.site)
        self.told[name] = change
        streams = self.recorder.streams() if self.recorder is not None and self.recorder.exact else None
        if streams is None or sum(map(len, streams.values())) >= weight.nbytes:
            self.undos[name] = Undo(weight.dtype, kept=kept_whole(weight.clone()))
        else:
            self.undos[name] = Undo(weight.dtype, streams=streams)


def merge_in_place(layers: Mapping[str, Adapted], changes: Changes, undo: UndoKind) -> None:
    """Merge into plain layers; on an error all of them are as they were."""
    targets = {one.site.name: parameter_of(layer, one) for name, layer in layers.items() for one in changes[name]}
    flat = [one for name in layers for one in changes[name]]
    flat.sort(key=lambda one: one.beside is None)  # what depends on the weight beside it, before that changes
    live = LiveWeights(targets, [change.site for change in flat])
    recorder, undone = LiveRecorder(live, undo), [one for one in flat if not one.held]
    originals = _hashes(live, undone)
    try:
        copy(Merged(live, flat, recorder), live)
    except BaseException:
        done = [recorder.told[name] for name in live.stored if name in recorder.told]
        copy(Unmerged(live, done, lambda change: recorder.undos[change.site.name]), live)
        raise
    merged = _hashes(live, undone)
    undos = {
        name: LiveUndo(recorder.told[name], recorder.undos[name], original, merged[name])
        for name, original in originals.items()
    }
    for name, layer in layers.items():
        mark_merged(layer, tuple(undos[one.site.name] for one in changes[name] if not one.held))


def unmerge_in_place(layers: Sequence[Adapted]) -> None:
    """Plain layers as they were. StateError for a weight, or a record, that has changed since."""
    undos = {one.change.site.name: _beside(one, layer.base_weight) for layer in layers for one in undos_of(layer)}
    targets = {one.change.site.name: parameter_of(layer, one.change) for layer in layers for one in undos_of(layer)}
    live = LiveWeights(targets, [])
    changes = [undo.change for undo in undos.values()]
    for name, digest in _hashes(live, changes).items():
        if digest != undos[name].merged_sha256:
            raise StateError(f"{printable(name)}: its merged weight has changed since the merge; it cannot be unmerged")
    copy(Unmerged(live, changes, lambda change: undos[change.site.name].undo), live)
    for name, digest in _hashes(live, changes).items():
        if digest != undos[name].original_sha256:
            raise StateError(f"{printable(name)}: the unmerged weight is not the original; its undo record has changed")


def mark_merged(layer: Adapted, undos: tuple[LiveUndo, ...] | None) -> None:
    """The base has what the active adapters gave it, so that these no longer run; None: it no longer has."""
    layer.merged = undos
    layer.activate(layer.active, layer.enabled)


def undos_of(layer: Adapted) -> tuple[LiveUndo, ...]:
    """Of the weight, and of the bias if that was changed too."""
    undos: tuple[LiveUndo, ...] = layer.merged
    return undos


def _hashes(live: LiveWeights, changes: Iterable[Change]) -> dict[str, str]:
    """sha256 of each weight as it is now; several at once, unless it takes all processes to gather one."""
    sites = [change.site for change in changes]
    workers = 1 if any(map(is_sharded, live.parameters.values())) else default_workers()
    found = in_order(lambda site: sha256_of(live.weight(site)), sites, workers)
    return {site.name: digest for site, digest in zip(sites, found, strict=True)}


def _beside(undo: LiveUndo, weight: Tensor) -> LiveUndo:
    """The same with its clones of the factors where the weight is now: the model may have moved since the merge."""
    layers = tuple(
        one._replace(params={role: values.to(weight.device) for role, values in one.params.items()})
        for one in undo.change.layers
    )
    return replace(undo, change=replace(undo.change, layers=layers))
