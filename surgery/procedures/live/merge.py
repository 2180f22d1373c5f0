"""merge and unmerge of a live model: the base weights change in place, and come back to the bit."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from surgery.core.adapter import Layer, bias_layers
from surgery.core.as_peft import Arithmetic, PeftMerge, refuse_unlike_peft
from surgery.core.sharded import is_sharded, rest, whole
from surgery.core.source import copy
from surgery.core.undo import Recorder
from surgery.core.workers import default_workers, in_order
from surgery.errors import MatchError, StateError, UsageError, printable
from surgery.hosts.change import Change, MergedTile
from surgery.hosts.model import LiveWeights, live_site
from surgery.hosts.quantized import is_quantized
from surgery.hosts.tree import adapted_layers, state_of
from surgery.hosts.unmerged import Undo, Unmerged, kept_whole
from surgery.hosts.views import Merged
from surgery.io.octets import sha256_of
from surgery.layers import Adapted
from surgery.ops.bias import Bias, bias_site
from surgery.procedures.live.held_layers import Landing
from surgery.procedures.live.standing_in import (
    check_into,
    dtype_of_model,
    held_as,
    plain_dtype,
    put_back,
    settle,
    stand_in,
    succeed,
)
from surgery.procedures.places.rows import merged_once
from surgery.procedures.places.stacking import merge_refusal, stack_of
from surgery.procedures.places.tied_heads import merged_with_embedding, unlike_peft

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
            self.recorder = Recorder() if self.kind == "index" and tile.steps is not None else None
        if self.recorder is not None and tile.steps is not None and tile.original is not None:
            self.recorder.add(tile.original, tile.merged, tile.steps)
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


def merge(root: nn.Module, undo: UndoKind = "index", landing: Landing | None = None) -> None:
    """Add the active adapters to the base weights; on an error everything is as it was.

    `undo` "index" records what cannot be recomputed; "copy" keeps the originals: faster, and as large as they.
    `landing` into "16bit" puts plain layers in the place of quantized ones meanwhile, "keep" or a format quantized
    ones; without it quantized layers are refused. Arithmetic other than "exact" gives PEFT's bits, and keeps the
    originals whatever `undo` says.
    Raises StateError if adapters are merged or none is active, MatchError for a tied weight, ValueRangeError,
    ConfigError for an adapter whose merge by PEFT is not known, UsageError for quantized weights, CheckError where a
    format leaves too little of the adapters.
    """
    if undo not in get_args(UndoKind):
        raise UsageError(f"merge: undo is {printable(undo)!r}; {' or '.join(get_args(UndoKind))} is wanted")
    landing = landing or Landing()
    refuse_merged(root, "merge again")
    rest(root)
    layers = {name: layer for name, layer in adapted_layers(root).items() if layer.running}
    if not layers:
        raise StateError("merge: no active adapter; inject one, or set_adapter and enable_adapters")
    if stack_of(root) is not None:
        raise merge_refusal("merge")
    into, arithmetic = landing.treatment.into, landing.treatment.arithmetic
    check_into(layers, into, arithmetic)
    held, model_dtype = landing.layers(layers), dtype_of_model(root)
    quantized = [one for one in layers.values() if is_quantized(one.base_layer) and into != "keep"]
    try:
        for layer in quantized:
            stand_in(layer, model_dtype)
        heads = merged_with_embedding(layers)
        if heads and arithmetic != "exact":
            raise unlike_peft(printable(min(heads)))
        once = merged_once(layers) | heads
        changes = {
            name: () if name in once else _followed(_changes(name, layer, model_dtype), arithmetic)
            for name, layer in layers.items()
        }
        _refuse_tied(root, layers, changes)
        made = landing.made({name: layer for name, layer in held.items() if changes[name]}, changes)
        _merge({name: layer for name, layer in layers.items() if name not in made}, changes, undo)
    except BaseException:
        for layer in quantized:
            put_back(layer)
        raise
    for name, one in made.items():
        succeed(layers[name], one)
        _rest_merged(layers[name], ())
    for layer in quantized:
        if not is_quantized(layer.base_layer):
            settle(layer, model_dtype)


def _merge(layers: Mapping[str, Adapted], changes: Mapping[str, tuple[Change, ...]], undo: UndoKind) -> None:
    """All plain layers, in place."""
    targets = {one.site.name: _parameter(layer, one) for name, layer in layers.items() for one in changes[name]}
    flat = [one for name in layers for one in changes[name]]
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
        _rest_merged(layer, tuple(undos[one.site.name] for one in changes[name] if not one.held))


def _hashes(live: LiveWeights, changes: Iterable[Change]) -> dict[str, str]:
    """sha256 of each weight as it is now; several at once, unless it takes all processes to gather one."""
    sites = [change.site for change in changes]
    workers = 1 if any(map(is_sharded, live.parameters.values())) else default_workers()
    found = in_order(lambda site: sha256_of(live.weight(site)), sites, workers)
    return {site.name: digest for site, digest in zip(sites, found, strict=True)}


def _rest_merged(layer: Adapted, undos: tuple[LiveUndo, ...]) -> None:
    """The base has what the active adapters gave it, so that these no longer run."""
    layer.merged = undos
    layer.activate(layer.active, layer.enabled)


def unmerge(root: nn.Module) -> None:
    """The base weights as they were before `merge`, to the bit.

    StateError, and nothing changes, if nothing is merged or a merged weight has changed since.
    """
    merged = [layer for layer in adapted_layers(root).values() if layer.merged is not None]
    if not merged:
        raise StateError("unmerge: nothing is merged; merge the model first")
    rest(root)
    _unmerge([layer for layer in merged if layer.beneath is None])
    for layer in merged:
        put_back(layer)
        layer.merged = None
        layer.activate(layer.active, layer.enabled)


def _unmerge(layers: Sequence[Adapted]) -> None:
    """All plain layers, in place."""
    undos = {one.change.site.name: _beside(one, layer.base_weight) for layer in layers for one in _here(layer)}
    targets = {one.change.site.name: _parameter(layer, one.change) for layer in layers for one in _here(layer)}
    live = LiveWeights(targets, [])
    changes = [undo.change for undo in undos.values()]
    for name, digest in _hashes(live, changes).items():
        if digest != undos[name].merged_sha256:
            raise StateError(f"{printable(name)}: its merged weight has changed since the merge; it cannot be unmerged")
    copy(Unmerged(live, changes, lambda change: undos[change.site.name].undo), live)
    for name, digest in _hashes(live, changes).items():
        if digest != undos[name].original_sha256:
            raise StateError(f"{printable(name)}: the unmerged weight is not the original; its undo record has changed")


def _beside(undo: LiveUndo, weight: Tensor) -> LiveUndo:
    """The same with its clones of the factors where the weight is now: the model may have moved since the merge."""
    layers = tuple(
        one._replace(params={role: values.to(weight.device) for role, values in one.params.items()})
        for one in undo.change.layers
    )
    return replace(undo, change=replace(undo.change, layers=layers))


def base_sha256(layer: Adapted) -> str:
    """sha256 of the layer's base weight, without what is merged into it; kept until the weight is changed."""
    if layer.merged is not None and layer.beneath is None:
        return _here(layer)[0].original_sha256
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


def refuse_merged(root: nn.Module, what: str) -> None:
    """StateError while adapters are merged, or a batch is mixed."""
    refuse_mixed(root, what)
    if state_of(root) is not None and any(layer.merged is not None for layer in adapted_layers(root).values()):
        raise StateError(f"cannot {what} while adapters are merged; unmerge first")


def refuse_mixed(root: nn.Module, what: str) -> None:
    """StateError while a batch is mixed."""
    state = state_of(root)
    if state is not None and state.mixed:
        raise StateError(f"cannot {what} while a batch is mixed; leave mixed_batch first")


def _changes(name: str, layer: Adapted, model_dtype: torch.dtype) -> tuple[Change, ...]:
    """What the active adapters make of a layer's weight and bias; the factors are cloned, for training may go on."""
    site = layer.site if layer.op.alone else live_site(name, layer.base_layer, layer.op)
    for one in layer.layers():
        one.method.refuse_merge(site)
    device = layer.base_weight.device
    layers = [
        Layer(one.method, {role: whole(values).to(device, copy=True) for role, values in one.params.items()})
        for one in layer.layers()
    ]
    held = held_as(layer)
    dtype = plain_dtype(layer.beneath, model_dtype) if held else site.weight.torch_dtype
    weight, bias = Change(site, dtype, tuple(layers), held=held), bias_site(site)
    on_bias = bias_layers(layers)
    return (weight, Change(bias, bias.weight.torch_dtype, on_bias, held=held)) if bias and on_bias else (weight,)


def _followed(changes: tuple[Change, ...], arithmetic: Arithmetic) -> tuple[Change, ...]:
    """The same by this arithmetic. ConfigError for a layer that it does not know."""
    if arithmetic == "exact":
        return changes
    for change in changes:
        for layer in change.layers:
            refuse_unlike_peft(layer.method, change.site)
    as_peft = PeftMerge(safe=arithmetic == "peft-safe", as_held=True)
    return tuple(replace(change, as_peft=as_peft) for change in changes)


def _parameter(layer: Adapted, change: Change) -> Tensor:
    """What the change is of."""
    role = "bias" if change.site.acting.name == Bias.name else "weight"
    held: Tensor = getattr(layer.innermost, layer.op.roles.get(role, role))
    return held


def _here(layer: Adapted) -> tuple[LiveUndo, ...]:
    """Of the weight, and of the bias if that was changed too."""
    undos: tuple[LiveUndo, ...] = layer.merged
    return undos


def _refuse_tied(root: nn.Module, layers: Mapping[str, Adapted], changes: Mapping[str, tuple[Change, ...]]) -> None:
    """MatchError where another module holds the very parameter."""
    owners: dict[int, dict[str, nn.Module]] = {}
    for name, module in root.named_modules():
        for parameter in module._parameters.values():
            owners.setdefault(id(parameter), {})[name] = module
    shared = {layer.innermost for name, layer in layers.items() if not changes[name]}  # of which nothing is said anew
    for name, layer in layers.items():
        for change in changes[name]:
            holding = owners[id(_parameter(layer, change))].items()
            others = [owner for owner, module in holding if module not in {layer.innermost, *shared}]
            if others:
                what = "bias" if change.site.acting.name == Bias.name else "weight"
                raise MatchError(
                    f"{printable(name)}: its {what} is tied to {printable(others[0])}; a merge would change both; "
                    "untie them, or leave it out of target_modules"
                )
