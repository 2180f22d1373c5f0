"""plan: what a merge would do to each weight of a checkpoint, and all that stands against it."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from surgery.codecs.plain import PLAIN_DTYPES
from surgery.core.adapter import Adapter
from surgery.core.select import unmatched
from surgery.core.site import Site
from surgery.core.source import TILE_ELEMENTS
from surgery.errors import ConfigError, FormatError, InputError, MatchError, UsageError, printable
from surgery.hosts.checkpoint import Checkpoint
from surgery.hosts.views import Change
from surgery.procedures.join import Joined, refused_copies, replaced

_RUNTIME_BYTES = 300_000_000  # Python and torch themselves
_TILE_COPIES = 12  # float64 tensors of a tile's size alive at once


class Weighted(NamedTuple):
    """An adapter and how strongly it applies."""

    adapter: Adapter
    weight: float = 1.0


@dataclass(frozen=True)
class Plan:
    """The changes in the order of the base's bytes; refusals; and remarks that stop nothing."""

    changes: tuple[Change, ...]
    refusals: tuple[InputError, ...]
    notes: tuple[str, ...]
    tensors: int
    read_bytes: int
    written_bytes: int
    peak_bytes: int  # an estimate of the resident memory
    undo_bytes: int  # an upper bound of what a reversible merge writes besides

    @property
    def ok(self) -> bool:
        return not self.refusals

    def require(self) -> None:
        """Raise the first refusal, which tells how many more there are."""
        if self.refusals:
            more = len(self.refusals) - 1
            first = self.refusals[0]
            raise type(first)(f"{first}" + (f" (and {more} more; `surgery plan` lists all)" if more else ""))

    def summary(self) -> str:
        """One line."""
        merged = sum(bool(change.layers) for change in self.changes)
        replaced = sum(change.saved is not None for change in self.changes)
        return (
            f"{merged} weights to merge, {replaced} to replace, {self.tensors - len(self.changes)} untouched, "
            f"{len(self.refusals)} refused; {self.written_bytes / 1e6:.1f} MB to write, "
            f"about {self.peak_bytes / 1e6:.0f} MB of memory"
        )

    def to_json(self) -> dict[str, Any]:
        return {
            "ok": self.ok,
            "changes": [describe(change) for change in self.changes],
            "refusals": [str(error) for error in self.refusals],
            "notes": list(self.notes),
            "bytes": {
                "read": self.read_bytes,
                "written": self.written_bytes,
                "peak_memory": self.peak_bytes,
                "undo_at_most": self.undo_bytes,
            },
        }


def describe(change: Change) -> dict[str, Any]:
    """What a change is, as data."""
    methods = [{"method": type(one.method).__name__, **one.method.settings()} for one in change.layers]
    return {
        "tensor": change.site.weight.name,
        "op": change.site.op.name if change.site.op else None,
        "shape": list(change.site.weight.shape),
        "dtype": str(change.dtype).removeprefix("torch."),
        "methods": methods,
        "replaced": change.saved is not None,
    }


def make_plan(base: Checkpoint, adapters: Sequence[Weighted], dtype: torch.dtype | None = None) -> Plan:
    """The plan of laying `adapters`, in this order, over `base`, all floats written in `dtype` if given."""
    changes: dict[str, Change] = {}
    refusals: list[InputError] = []
    notes: list[str] = []
    for adapter, weight in adapters:
        refusals += _lay(base, adapter, weight, changes)
        notes += _notes(adapter)
    for name, change in changes.items():
        if change.site.weight.dtype not in PLAIN_DTYPES:
            held = str(change.site.weight.dtype).removeprefix("torch.")
            refusals.append(
                FormatError(f"{printable(name)}: held as {held}; plain floats are wanted; dequantize first")
            )
    if dtype is not None:
        _cast_all(base, dtype, changes)
    ordered = [changes[info.name] for info in base.tensors() if info.name in changes]
    return _costed(base, adapters, ordered, refusals, notes)


def check_dtype(name: str | torch.dtype | None) -> torch.dtype | None:
    """The plain dtype of that name. UsageError for another."""
    known = {str(dtype).removeprefix("torch."): dtype for dtype in PLAIN_DTYPES}
    if name is None or name in PLAIN_DTYPES:
        return name if isinstance(name, torch.dtype) else None
    if name not in known:
        raise UsageError(f"dtype {printable(name)!r} is not known; one of {', '.join(known)} is wanted")
    return known[str(name)]


def _lay(base: Checkpoint, adapter: Adapter, weight: float, changes: dict[str, Change]) -> list[InputError]:
    """Add what one adapter changes; returns its refusals."""
    joined = Joined(base, adapter, weight)
    refusals = [*joined.refusals, *refused_copies(base, adapter)]
    for site, layer in joined.layers.values():
        name = site.weight.name
        before = changes.get(name, Change(Site(name, {"weight": site.weight}, site.op), site.weight.torch_dtype))
        if before.saved is not None or before.site.op != site.op:
            refusals.append(MatchError(f"{printable(name)}: two adapters treat it in ways that exclude each other"))
        changes[name] = Change(before.site, before.dtype, (*before.layers, layer))
    sites, missing = replaced(base, adapter)
    if adapter.saved and weight != 1:
        raise ConfigError(f"{printable(adapter.where)}: it replaces modules (modules_to_save); its weight must be 1")
    for site, values in sites:
        if site.name in changes:
            refusals.append(MatchError(f"{printable(site.name)}: it would be replaced twice, or adapted and replaced"))
        changes[site.name] = Change(site, site.weight.torch_dtype, saved=values)
    return refusals + missing


def _cast_all(base: Checkpoint, dtype: torch.dtype, changes: dict[str, Change]) -> None:
    for info in base.tensors():
        if info.dtype in PLAIN_DTYPES:
            before = changes.get(info.name, Change(Site(info.name, {"weight": info}), dtype))
            if info.dtype != dtype or info.name in changes:
                changes[info.name] = Change(before.site, dtype, before.layers, before.saved)


def _notes(adapter: Adapter) -> list[str]:
    config, where = adapter.config, printable(adapter.where)
    notes = [
        f"{where}: target_modules entry {printable(entry)!r} has no tensors"
        for entry in unmatched(config, adapter.sites.keys())
    ]
    for entry in sorted(config.modules_to_save or ()):
        if not any(f".{entry}." in f".{name}" for name in adapter.saved):
            notes.append(f"{where}: modules_to_save entry {printable(entry)!r} has no tensors")
    return notes


def _costed(
    base: Checkpoint,
    adapters: Sequence[Weighted],
    changes: Sequence[Change],
    refusals: Sequence[InputError],
    notes: Sequence[str],
) -> Plan:
    infos = list(base.tensors())
    written = {change.site.weight.name: change for change in changes}
    sizes = [info._replace(dtype=written[info.name].dtype if info.name in written else info.dtype) for info in infos]
    tile = max((min(TILE_ELEMENTS, info.nbytes) for info in infos), default=0)
    held = sum(v.nbytes for one in adapters for params in one.adapter.sites.values() for v in params.values())
    held += sum(v.nbytes for one in adapters for v in (*one.adapter.saved.values(), *one.adapter.copies.values()))
    return Plan(
        tuple(changes),
        tuple(refusals),
        tuple(notes),
        tensors=len(infos),
        read_bytes=sum(info.nbytes for info in infos),
        written_bytes=sum(info.nbytes for info in sizes),
        peak_bytes=_RUNTIME_BYTES + held + 8 * _TILE_COPIES * tile,
        undo_bytes=held + sum(change.site.weight.nbytes for change in changes),
    )
