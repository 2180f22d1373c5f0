"""plan: what a merge would do to each weight of a checkpoint, and all that stands against it."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from heapq import nlargest
from math import prod
from typing import Any

from surgery.adapters import out_proj
from surgery.core.adapter import Weighted
from surgery.core.names import Naming
from surgery.core.report import Report, in_units
from surgery.core.site import Site, TensorInfo
from surgery.core.source import TILE_ELEMENTS, Source
from surgery.core.workers import default_workers
from surgery.errors import ConfigError, InputError, printable
from surgery.hosts.change import Change, Watch
from surgery.hosts.checkpoint import Checkpoint
from surgery.hosts.encoded import Encoded, standing, told_in_headers
from surgery.hosts.through import Through
from surgery.procedures.planning.beside import follow_weights
from surgery.procedures.planning.covering import cover, leave_plain
from surgery.procedures.planning.draft import Draft
from surgery.procedures.planning.feeding import feed_back
from surgery.procedures.planning.matched import matched
from surgery.procedures.planning.remarks import notes_of, notes_of_weights, unchecked
from surgery.procedures.planning.treatment import HELD_IN, Treatment
from surgery.procedures.planning.true_config import true_config
from surgery.procedures.planning.unpacking import keep, pass_through, unpack

_RUNTIME_BYTES = 300_000_000  # Python and torch themselves
_TILE_COPIES = 12  # float64 tensors of a tile's size alive at once


@dataclass(frozen=True, repr=False)
class Plan(Report):
    """The changes in the order of the base's bytes; refusals; and remarks that stop nothing.

    `ok` says whether the merge would run, and `require` raises the first refusal otherwise.
    """

    changes: tuple[Change, ...]
    refusals: tuple[InputError, ...]
    notes: tuple[str, ...]
    tensors: int
    read_bytes: int
    written_bytes: int
    peak_bytes: int  # an estimate of the resident memory
    undo_bytes: int  # an upper bound of what a reversible merge writes besides
    namings: tuple[Naming, ...] = ()  # by adapter: what leads from its names to the base's
    laid: tuple[Weighted, ...] = ()  # the adapters as their layers are called
    config: Mapping[str, Any] | None = None  # what config.json has to say afterwards; None: what it says now
    matched: Mapping[str, Sequence[Mapping[str, Any]]] = field(default_factory=dict)  # by tensor, of each layer over it

    @property
    def ok(self) -> bool:
        return not self.refusals

    def require(self) -> None:
        """Raise the first refusal, which tells how many more there are."""
        if self.refusals:
            more = len(self.refusals) - 1
            first = self.refusals[0]
            raise type(first)(f"{first}" + (f" (and {more} more; `surgery plan` lists all)" if more else ""))

    def probed(self, count: int) -> "Plan":
        """With so many probes of what a format leaves of each change."""
        changes = (replace(one, probes=count) if one.into or one.keep else one for one in self.changes)
        return replace(self, changes=tuple(changes))

    def source(self, base: Checkpoint) -> Source:
        """The base as the changes are laid over it."""
        forms = {one.site.weight.name: one.through for one in self.changes if one.through}
        return Through(base, forms) if forms else base

    def view(self, base: Checkpoint, watch: Watch) -> Encoded:
        """The base as it reads afterwards; `watch` sees its tiles."""
        return Encoded(self.source(base), self.changes, watch)

    def written(self) -> dict[str, list[TensorInfo]]:
        """The weights that change, as their tensors stand in the output; those that keep their format aside."""
        return _written(self.changes)

    def headers(self, base: Checkpoint) -> Mapping[str, str]:
        """What those of the output say of the weights that go into a form."""
        return told_in_headers(self.changes, base.called)

    def summary(self) -> str:
        """One line."""
        merged = sum(bool(change.layers) for change in self.changes)
        replaced = sum(change.saved is not None for change in self.changes)
        touched = sum(not change.new for change in self.changes)
        return (
            f"{merged} weights to merge, {replaced} to replace, {self.tensors - touched} untouched, "
            f"{len(self.refusals)} refused; {in_units(self.written_bytes)} to write, "
            f"about {in_units(self.peak_bytes)} of memory"
        )

    def to_json(self) -> dict[str, Any]:
        return {
            "ok": self.ok,
            "changes": [self._told(change) for change in self.changes],
            "refusals": [str(error) for error in self.refusals],
            "notes": list(self.notes),
            "bytes": {
                "read": self.read_bytes,
                "written": self.written_bytes,
                "peak_memory": self.peak_bytes,
                "undo_at_most": self.undo_bytes,
            },
        }

    def _told(self, change: Change) -> dict[str, Any]:
        """What a change is, and why: what each layer is there by, and what a tensor that is new begins as."""
        begins = {"begins": change.begins.weight.name} if change.begins is not None else {}
        return {**describe(change), "matched": list(self.matched.get(change.site.weight.name, ())), **begins}


def describe(change: Change) -> dict[str, Any]:
    """What a change is, as data."""
    methods = [{"method": one.method.name, **one.method.settings()} for one in change.layers]
    return {
        "tensor": change.site.weight.name,
        "op": change.site.op.name if change.site.op else None,
        "shape": list(change.site.weight.shape),
        "dtype": str(change.dtype).removeprefix("torch."),
        "methods": methods,
        "replaced": change.saved is not None,
        **({"held": change.held} if change.held else {}),
        **({"kept": True} if change.keep else {}),
        **({"undo": "copy"} if change.mixes else {}),
        **({"into": change.into} if change.into else {}),
        **({"rounding": "feedback"} if change.feedback else {}),
        **({"calibrated": True} if change.calibrated is not None else {}),
        **({"base_as": change.through} if change.through else {}),
    }


def make_plan(
    base: Checkpoint, adapters: Sequence[Weighted], treatment: Treatment | None = None, plainly: Collection[str] = ()
) -> Plan:
    """The plan of laying `adapters`, in this order, over `base`; weights of `plainly` go into no format."""
    treatment = treatment or Treatment()
    draft = Draft(base, treatment.ops)
    for index, given in enumerate(adapters):
        draft.lay(given, index)
    if treatment.base_as is not None:
        pass_through(draft, treatment.base_as, treatment.compute_dtype)
    elif treatment.into == "keep":
        keep(draft, treatment.dtype or treatment.compute_dtype, plainly)
        leave_plain(draft)
    else:
        unpack(draft, treatment.compute_dtype, treatment.into == "16bit")
    follow_weights(draft)
    draft.settle(treatment.tied)
    draft.notes += [
        note
        for one, naming in zip(adapters, draft.namings, strict=True)
        for note in unchecked(base, one.adapter, naming)
    ]
    if treatment.dtype is not None:
        draft.cast(treatment.dtype)
    if treatment.into in HELD_IN:
        cover(draft, treatment.into, plainly)
    elif draft.plain:
        draft.notes.append("config.json loses its quantization_config")
    if treatment.rounding == "feedback":
        feed_back(draft, treatment.calibration)
    for one in adapters:
        out_proj.refuse_other(one.adapter, treatment.arithmetic)
        if treatment.arithmetic != "exact" and one.adapter.config.parameters():
            where = printable(one.adapter.where)
            raise ConfigError(f"{where}: PEFT's merge of target_parameters is not known; give `arithmetic=exact`")
    draft.follow(treatment.arithmetic)
    draft.notes += draft.kept_whole()
    config = true_config(base.config, treatment.dtype, draft.outcome())
    return _costed(base, adapters, draft, config)


def _sums_bytes(change: Change) -> int:
    """Of the sums that its layers have to know, a float64 for each output; what is beside its weight is kept whole."""
    return sum(8 * change.site.shape[0] for layer in change.layers if layer.method.couples and layer.beside is None)


def _rows_together(site: Site) -> int:
    """Elements of the rows that no tile parts."""
    return site.together * prod(site.weight.shape[1:])


def _work_bytes(change: Change) -> int:
    """Of what its layers compute with; of one merged whole, itself twice, its change thrice in float32 or wider."""
    weight = change.site.weight
    if change.as_peft is None:
        return sum(layer.method.work_bytes(change.site) for layer in change.layers)
    wide = max(4, weight.torch_dtype.itemsize)
    return 2 * weight.nbytes + 3 * wide * weight.nbytes // weight.torch_dtype.itemsize


def _at_once(base: Checkpoint, changes: Sequence[Change]) -> int:
    """How many weights are at work at once: one of each file, or one alone as PEFT merges it."""
    return 1 if any(one.as_peft for one in changes) else min(default_workers(), len(base.files))


def _written(changes: Sequence[Change]) -> dict[str, list[TensorInfo]]:
    return {one.site.weight.name: standing(one) for one in changes if not one.keep}


def _costed(base: Checkpoint, adapters: Sequence[Weighted], draft: Draft, config: Mapping[str, Any] | None) -> Plan:
    changes = draft.ordered()
    written = _written(changes)
    gone = {held for name in written if name in base.packed for held in base.holding(name)}
    infos = {info.name: info for info in base.tensors() if info.name not in gone}
    infos |= {info.name: info for one in written.values() for info in one}
    tiles = [min(TILE_ELEMENTS, info.nbytes) for info in infos.values()]
    tile = max([*tiles, *(_rows_together(one.site) for one in changes)], default=0)
    at_once = _at_once(base, changes)
    sites = [size for one in draft.laid for size in one.adapter.site_bytes()]
    whole = [v.nbytes for one in adapters for v in (*one.adapter.saved.values(), *one.adapter.copies.values())]
    whole += [one.adapter.shared_bytes() for one in draft.laid]
    return Plan(
        tuple(changes),
        tuple(draft.refusals),
        (*(note for one in adapters for note in notes_of(one.adapter)), *draft.notes, *notes_of_weights(adapters)),
        tensors=sum(1 for _ in base.weights()),
        read_bytes=sum(info.nbytes for info in base.tensors()),
        written_bytes=sum(info.nbytes for info in infos.values()),
        peak_bytes=_RUNTIME_BYTES
        + sum(whole)
        + sum(nlargest(at_once, sites))
        + 8 * _TILE_COPIES * tile * at_once
        + sum(nlargest(at_once, map(_work_bytes, changes))),
        undo_bytes=sum(sites) + sum(whole) + sum(one.site.weight.nbytes + _sums_bytes(one) for one in changes),
        namings=tuple(draft.namings),
        laid=tuple(draft.laid),
        config=config,
        matched=matched(changes, adapters, draft.laid),
    )
