"""Draft: the changes of a plan while adapters are laid over a base, one after another."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

from surgery.codecs.plain import PLAIN_DTYPES
from surgery.core.adapter import Layer, Weighted
from surgery.core.as_peft import Arithmetic, PeftMerge, refuse_unlike_peft
from surgery.core.layered import refuse_over
from surgery.core.names import Naming, nearest, suffix_hits
from surgery.core.site import Site
from surgery.errors import ConfigError, FormatError, InputError, MatchError, printable
from surgery.hosts.change import Change
from surgery.hosts.checkpoint import Checkpoint
from surgery.io.header import DTYPES
from surgery.procedures.places.stacking import merge_refusal
from surgery.procedures.places.tied_heads import unlike_peft
from surgery.procedures.places.tying import HEAD, Tying, tied_though_held, tying_of, vocabulary
from surgery.procedures.planning.join import Joined
from surgery.procedures.planning.remarks import loose
from surgery.procedures.planning.ties import Settled, Tied, hidden_ties, settle_absent, settle_held
from surgery.procedures.planning.true_config import Outcome
from surgery.procedures.planning.wholes import Whole, same

_WHOLE_NUMBERS = frozenset(DTYPES[name] for name in ("I64", "I32", "I16", "I8", "U64", "U32", "U16", "U8", "BOOL"))

_APART = "leave one of the adapters out, or merge them apart, one into what the other made"


class Draft:
    """`changes` by tensor, what stands against them, and what is worth a remark."""

    def __init__(self, base: Checkpoint, ops: Mapping[str, str]) -> None:
        self.base, self.ops = base, ops
        self.tying = tying_of(base)
        self.changes: dict[str, Change] = {}
        self.refusals: list[InputError] = []
        self.notes: list[str] = []
        self.heads: dict[str, tuple[int, ...]] = {}  # shapes of what only an adapter brings
        self.task_type: str | None = None  # of the adapter that brings them
        self.untied = False
        self.turned = False  # has a tied head the factors of its embedding?
        self.tied: set[int] = set()  # adapters of which one layer changes all that a shared embedding is
        self.plain = False  # are weights written otherwise that config.json says are quantized?
        self.quantization: Mapping[str, Any] | None = None  # what config.json is to say of that instead
        self.namings: list[Naming] = []  # by adapter
        self.laid: list[Weighted] = []  # the adapters, with the base's own tensors for sites
        self._begun: set[str] = set()  # tensors that begin as an adapter's copy of the resized base
        self._names: set[str] = set()  # of all sites, as the adapters and as the base have them

    def lay(self, given: Weighted, index: int) -> None:
        """Add what one adapter changes."""
        if given.adapter.saved and given.weight != 1:
            fields = "target_modules" if given.adapter.config.copied else "modules_to_save, bias"
            raise ConfigError(
                f"{printable(given.adapter.where)}: its weight is {given.weight}; {fields} of it replaces tensors; "
                "a weight of 1 is wanted"
            )
        if given.adapter.config.stacking():
            self.refusals.append(merge_refusal(printable(given.adapter.where)))
            self.namings.append(Naming())
            self.laid.append(given)
            return
        joined = Joined(self.base, given, index, self.ops)
        self.refusals += joined.refusals
        self.tied |= {index} if joined.stays_tied else set()
        self.namings.append(joined.naming)
        self.laid.append(given._replace(adapter=joined.adapter))
        self.notes += [] if joined.refusals else loose(joined.adapter, joined.sites)
        self._names |= {*joined.adapter.sites, *(site.name for site, _ in joined.layers.values())}
        for name, whole in joined.wholes.items():
            self._replace(name, whole)
        for site, layer in joined.layers.values():
            self._add(site, layer)
        for name in joined.heads:
            self.heads[name] = joined.wholes[name].info.shape
            self.task_type = given.adapter.config.task_type
            self.notes.append(f"{printable(name)} is not in the base; the adapter brings it, and it is added")

    def settle(self, tied: str) -> None:
        """What can only be said of all changes together: `tied` is "refuse" or "untie"."""
        for entry in self.ops:
            if not any(suffix_hits((entry,), name) for name in self._names):
                close = ", ".join(map(printable, nearest(entry, self._names)))
                step = f"nearest: {close}; name one of them" if close else "leave it out"
                told = f"`ops` {printable(entry)}: no site of the adapters has this name; {step}"
                self.refusals.append(MatchError(told))
        if self.tied:
            self.turned = True
            self.notes.append("the shared embedding changes once, and the modules that it is stay tied to it")
        self._settle_ties(untie=tied == "untie")
        self._check_vocabulary()
        for name, change in self.changes.items():
            if any(layer.method.mixes or layer.method.replaced_rows for layer in change.layers):
                self._refuse(change)
            self._check_beside(name, change)
            held = change.site.weight.dtype
            if held not in PLAIN_DTYPES:
                what = str(held).removeprefix("torch.")
                self.refusals.append(
                    FormatError(f"{printable(name)}: held as {what}; plain floats are wanted; dequantize first")
                )

    def cast(self, dtype: torch.dtype) -> None:
        """All floats are written in `dtype`."""
        for info in self.base.weights():
            if info.name not in self.changes and info.dtype in PLAIN_DTYPES and info.dtype != dtype:
                self.changes[info.name] = Change(Site(info.name, {"weight": info}), dtype)
        for name, change in self.changes.items():
            if change.dtype in PLAIN_DTYPES:
                self.changes[name] = replace(change, dtype=dtype)
        held = {info.dtype for info in self.base.weights()} - set(PLAIN_DTYPES) - _WHOLE_NUMBERS
        for other in sorted(map(str, held)):
            self.notes.append(f"tensors in {other.removeprefix('torch.')} are carried as they are, not cast")

    def follow(self, arithmetic: Arithmetic) -> None:
        """All layers are merged by this arithmetic. ConfigError for one that it does not know."""
        if self.turned and arithmetic != "exact":
            raise unlike_peft(HEAD)
        laid = {name: change for name, change in self.changes.items() if change.layers and arithmetic != "exact"}
        for name, change in laid.items():
            for layer in change.layers:
                refuse_unlike_peft(layer.method, change.site)
            if change.held:
                self.refusals.append(
                    FormatError(
                        f"{printable(name)}: held as {change.held}, which PEFT would quantize anew; give "
                        "`arithmetic=exact`, or dequantize the base first"
                    )
                )
            self.changes[name] = replace(change, as_peft=PeftMerge(safe=arithmetic == "peft-safe"))

    def ordered(self) -> list[Change]:
        """In the order of the base's bytes; then those that the base lacks."""
        here = [info.name for info in self.base.weights() if info.name in self.changes]
        new = [name for name in self.changes if self.base.info(name) is None]
        return [self.changes[name] for name in (*here, *new)]

    def kept_whole(self) -> list[str]:
        """What is to be said of weights that nothing but themselves brings back."""
        mixing = {layer.method.name for one in self.changes.values() for layer in one.layers if layer.method.mixes}
        count = sum(one.mixes for one in self.changes.values())
        told = "makes each element of several others, so that a reversible merge keeps the weights whole"
        return [f"{', '.join(sorted(mixing))} {told}: {count} of them"] if mixing else []

    def outcome(self) -> Outcome:
        """What config.json has to tell of."""
        sizes = {self.changes[name].site.weight.shape[0] for name in self._grown()}
        return Outcome(max(sizes, default=None), self.untied, self.heads, self.task_type, self.plain, self.quantization)

    def _refuse(self, change: Change) -> None:
        """What no merge of its layers over one another holds."""
        try:
            refuse_over([layer.method for layer in change.layers], change.site)
        except MatchError as error:
            self.refusals.append(error)

    def _check_beside(self, name: str, change: Change) -> None:
        """The weight that a bias depends on is one of the base's, as it is."""
        weight = None if change.beside is None else change.beside.weight.name
        replaced = weight in self.changes and self.changes[weight].saved is not None
        if weight is not None and (replaced or self.base.info(weight) is None):
            method = next(one.method.name for one in change.layers if one.beside is not None)
            self.refusals.append(
                MatchError(
                    f"{printable(name)}: {method} makes it of {printable(weight)}, which is not "
                    "in the base as it is; leave it out of target_modules, or merge without what replaces or ties it"
                )
            )

    def _replace(self, name: str, whole: Whole) -> None:
        before = self.changes.get(name)
        if before is not None:
            if not (name in self._begun and whole.copied and same(before.saved, whole.values)):
                self.refusals.append(
                    MatchError(f"{printable(name)}: it would be replaced twice, or adapted and replaced; {_APART}")
                )
            return
        site = Site(name, {"weight": whole.info})
        self.changes[name] = Change(site, whole.info.torch_dtype, saved=whole.values, new=whole.new)
        if whole.copied:
            self._begun.add(name)

    def _add(self, site: Site, layer: Layer) -> None:
        name = site.weight.name
        new = self.base.info(name) is None  # the head that is tied, written apart
        before = self.changes.get(name, Change(_alone(site), site.weight.torch_dtype, new=new))
        replaced = before.saved is not None and name not in self._begun
        if replaced or (before.layers and before.site.op != site.op):
            self.refusals.append(
                MatchError(f"{printable(name)}: two adapters treat it in ways that exclude each other; {_APART}")
            )
        self.changes[name] = replace(before, site=_alone(site), layers=(*before.layers, layer))

    def _settle_ties(self, untie: bool) -> None:
        """What the changes of an embedding and of its head come to."""
        held = tied_though_held(self.base) if self.tying is None else None
        if self.tying is not None:
            if self._bears_on(self.tying):
                self._take(self.tying, settle_absent(self._tied(self.tying), untie))
        else:
            self.refusals += hidden_ties(self.base, self.changes, self._begun, self.tied)
        if held is not None:
            self._take(held, settle_held(self._tied(held)))

    def _tied(self, tying: Tying) -> Tied:
        embedding, head = tying.embedding.name, tying.head.weight.name
        changes = self.changes.get(embedding), self.changes.get(head)
        return Tied(self.base, tying, *changes, resized=embedding in self._begun, shared=self.tied)

    def _take(self, tying: Tying, settled: Settled) -> None:
        head = tying.head.weight.name
        if settled.head is None:
            self.changes.pop(head, None)
        else:
            self.changes[head] = settled.head
        self.untied, self.turned = settled.untied, self.turned or settled.turned
        self.refusals += [] if settled.refusal is None else [settled.refusal]
        self.notes += [settled.note] if settled.note else []

    def _bears_on(self, tying: Tying) -> bool:
        """May something be changed of the two? Else what the head is called need not be known."""
        return tying.embedding.name in self.changes or self._brings_new()

    def _brings_new(self) -> bool:
        """Is something changed that the base lacks, such as a head?"""
        return any(self.base.info(name) is None for name in self.changes)

    def _grown(self) -> list[str]:
        """The tensors that have rows for more, or fewer, tokens than the base."""
        known = vocabulary(self.base)
        if self.tying is not None and self._brings_new():
            known[self.tying.head.weight.name] = self.tying.head.weight
        here = {name: self.changes[name].site.weight for name in known if name in self.changes}
        return [name for name, info in here.items() if info.shape[0] != known[name].shape[0]]

    def _check_vocabulary(self) -> None:
        """All tensors of the vocabulary grow alike."""
        grown = self._grown()
        sizes = {self.changes[name].site.weight.shape[0] for name in grown}
        left = [name for name in vocabulary(self.base) if name not in grown]
        if len(sizes) > 1 or (grown and left):
            told = ", ".join(f"{printable(name)} {self.changes[name].site.weight.shape[0]}" for name in grown)
            others = f"; {printable(left[0])} keeps the base's" if left else ""
            self.refusals.append(MatchError(f"the vocabulary's sizes do not agree: {told}{others}; they must be equal"))


def _alone(site: Site) -> Site:
    """The weight's tensor as a site of its own, named as it is."""
    return Site(site.weight.name, {"weight": site.weight}, site.op)
