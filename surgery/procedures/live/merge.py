"""merge and unmerge of a live model: the base weights change in place, and come back to the bit."""

from collections.abc import Mapping
from typing import get_args

from torch import nn

from surgery.core.sharded import rest
from surgery.errors import StateError, UsageError, printable
from surgery.hosts.of_peft import refuse_adapters_of_peft
from surgery.hosts.quantized import is_quantized
from surgery.hosts.tree import adapted_layers, refuse_merged, replaced_modules
from surgery.layers import Adapted, Replaced
from surgery.procedures.live.changes import changes_of
from surgery.procedures.live.held_layers import Landing
from surgery.procedures.live.in_place import UndoKind, mark_merged, merge_in_place, unmerge_in_place
from surgery.procedures.live.standing_in import check_into, dtype_of_model, put_back, settle, standing_in, succeed
from surgery.procedures.places.stacking import merge_refusal, stack_of


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
    landing, layers = landing or Landing(), _running(root)
    into, arithmetic = landing.treatment.into, landing.treatment.arithmetic
    check_into(layers, into, arithmetic)
    held, model_dtype = landing.layers(layers), dtype_of_model(root)
    quantized = [one for one in layers.values() if is_quantized(one.base_layer) and into != "keep"]
    with standing_in(quantized, model_dtype):
        changes = changes_of(root, layers, arithmetic, model_dtype)
        made = landing.made({name: layer for name, layer in held.items() if changes[name]}, changes)
        merge_in_place({name: layer for name, layer in layers.items() if name not in made}, changes, undo)
    for name, one in made.items():
        succeed(layers[name], one)
        mark_merged(layers[name], ())
    for layer in quantized:
        if not is_quantized(layer.base_layer):
            settle(layer, model_dtype)
    for holder in _copies(root):
        holder.merged = True


def unmerge(root: nn.Module) -> None:
    """The base weights as they were before `merge`, to the bit.

    StateError, and nothing changes, if nothing is merged or a merged weight has changed since.
    """
    merged = [layer for layer in adapted_layers(root).values() if layer.merged is not None]
    holders = [holder for holder in replaced_modules(root).values() if holder.merged]
    if not merged and not holders:
        raise StateError("unmerge: nothing is merged; merge the model first")
    rest(root)
    unmerge_in_place([layer for layer in merged if layer.beneath is None])
    for layer in merged:
        put_back(layer)
        mark_merged(layer, None)
    for holder in holders:
        holder.merged = False


def _running(root: nn.Module) -> Mapping[str, Adapted]:
    """The layers over which adapters run. StateError where none can be merged."""
    refuse_merged(root, "merge again")
    rest(root)
    layers = {name: layer for name, layer in adapted_layers(root).items() if layer.running}
    if not layers and not _copies(root):
        refuse_adapters_of_peft(root)
        raise StateError("merge: no active adapter; inject one, or set_adapter and enable_adapters")
    if stack_of(root) is not None:
        raise merge_refusal("merge")
    return layers


def _copies(root: nn.Module) -> list[Replaced]:
    """The modules of which a copy runs: a merge leaves them so."""
    return [one for one in replaced_modules(root).values() if one.running is not one.original]
