"""Remarks: what a plan says of its adapters and stops nothing."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from surgery.adapters import out_proj
from surgery.adapters.completing import drawn_notes, place_notes
from surgery.adapters.peft import TENSORS
from surgery.codecs.plain import PLAIN_DTYPES
from surgery.core.adapter import Adapter, Weighted, are_as_told
from surgery.core.names import Naming
from surgery.core.select import unmatched
from surgery.core.site import Site
from surgery.errors import InputError, printable, quoted
from surgery.hosts.checkpoint import Checkpoint

_WEIGHTS = frozenset({".safetensors", ".bin", ".pt", ".pth"})
_AXES = 2  # of a weight, that are outputs and inputs; a convolution has its kernel besides
_DWARFS = 1000.0  # a weight of 1 adds the change as trained, which is some per cent of the base


def notes_of(adapter: Adapter) -> list[str]:
    """What its config names and its tensors do not, what is drawn for it, and files beside it that are not read."""
    config, where = adapter.config, printable(adapter.where)
    notes = [
        f"{where}: target_modules entry {quoted(entry)} has no tensors"
        for entry in unmatched(config, {*adapter.sites, *adapter.targets})
    ]
    notes += [
        f"{where}: {field} entry {quoted(entry)} matches no tensors"
        for field, entries in ({} if config.parameters() else config.unused(adapter.sites.keys())).items()
        for entry in entries  # of parameters, whose sites the files name otherwise, nothing is said
    ]
    notes += [*out_proj.notes(adapter), *drawn_notes(adapter), *place_notes(adapter), *_unread(adapter)]
    for entry in sorted(config.modules_to_save or ()):
        if not any(f"{entry}." in name for name in adapter.saved):
            notes.append(f"{where}: modules_to_save entry {quoted(entry)} has no tensors")
    return notes


def _unread(adapter: Adapter) -> list[str]:
    """Other files beside its own that look as if they held tensors of it."""
    found = Path(adapter.where).glob("adapter_model*")
    others = sorted(one.name for one in found if one.suffix in _WEIGHTS and one.name not in adapter.files)
    told = ", ".join(map(printable, others))
    return [f"{printable(adapter.where)}: {told} beside {TENSORS}: not read"] if others else []


def loose(adapter: Adapter, sites: Mapping[str, Site]) -> list[str]:
    """Whether its tensors would fit weights twice as wide too, so that nothing of it tells its base from another."""
    if not sites or adapter.trained_on or adapter.saved or not all(_fits_wider(adapter, *one) for one in sites.items()):
        return []
    named = adapter.config.base_model_name_or_path
    base = f", which its config calls {printable(named)}," if named else ""
    return [
        f"{printable(adapter.where)}: its tensors fit weights of other sizes as well, so that whether this is its "
        f"base{base} cannot be told"
    ]


def _fits_wider(adapter: Adapter, name: str, site: Site) -> bool:
    """Does it, at this site by the adapter's own name?"""
    if site.acting.stack or len(site.weight.shape) < _AXES:
        return False
    wider = tuple((2 if axis < _AXES else 1) * extent for axis, extent in enumerate(site.weight.shape))
    as_wide = Site(site.name, {"weight": site.weight._replace(shape=wider)}, site.op)
    try:
        return are_as_told(adapter.sites[name], adapter.config.method(name).tensors(as_wide))
    except InputError:
        return False


def unchecked(base: Checkpoint, adapter: Adapter, naming: Naming) -> list[str]:
    """Whether the adapter tells of a base in another dtype, which no hash can tell from this one."""
    for name, (info, _) in adapter.trained_on.items():
        there = base.at[naming.of(name)][1].info if naming.of(name) in base.at else info
        if there.dtype != info.dtype:
            held = base.packed.get(there.name)
            told, here = (str(one).removeprefix("torch.") for one in (info.dtype, there.dtype))
            here = here if held is None else held.form or held.codec.name
            told = told if info.dtype in PLAIN_DTYPES else f"codes ({told})"
            return [
                f"{printable(adapter.where)}: trained on a base in {told}, this one is in {here}; whether it is the "
                "same cannot be told"
            ]
    return []


def notes_of_weights(adapters: Sequence[Weighted]) -> Iterator[str]:
    """Of a weight by which nothing comes in, or nothing is left of the base; and of the same adapter again."""
    for adapter, weight in adapters:
        where = printable(adapter.where)
        if weight == 0:
            yield f"{where}: its weight is 0, so that nothing of it is merged"
        elif abs(weight) >= _DWARFS:
            yield f"{where}: its weight is {weight:g}, by which its change dwarfs the base; 1 is the change as trained"
    counts = Counter(one.adapter.digest for one in adapters if one.adapter.files)
    for digest in [digest for digest, count in counts.items() if count > 1]:
        same = [one for one in adapters if one.adapter.digest == digest]
        total = sum(weight for _, weight in same)
        yield f"{printable(same[0].adapter.where)}: the same adapter is given {len(same)} times, by {total:g} in all"
