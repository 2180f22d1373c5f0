"""Merged: a host as it reads with adapters laid over it."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from surgery.codecs import codec_of
from surgery.core.adapter import Started
from surgery.core.arithmetic import all_finite
from surgery.core.as_peft import PeftMerge
from surgery.core.codec import Packed
from surgery.core.elementwise import Elementwise
from surgery.core.feedback import Feedback
from surgery.core.method import Dense
from surgery.core.rounding import Rounding, rounding
from surgery.core.site import Site
from surgery.core.source import Source
from surgery.core.undo import accumulate_onto
from surgery.errors import ValueRangeError, printable
from surgery.hosts.change import Change, MergedTile, Watch, elementwise, ends, reads_of, told_where
from surgery.hosts.couplings import Couplings, coupled
from surgery.hosts.rounding import feedback_of, rounded


class Merged:
    """The changed weights of `source`, computed a tile at a time in float64 and rounded once.

    A weight that is merged as PEFT does is computed whole, when its first tile is asked for.
    `started` is of those whose layers another view has started, too.
    """

    def __init__(
        self,
        source: Source,
        changes: Iterable[Change],
        watch: Watch | None = None,
        started: Mapping[str, Started] | None = None,
    ) -> None:
        self.source, self.watch = source, watch
        self.changes = {change.site.name: change for change in changes}
        self.written = {change.site.written: change for change in self.changes.values()}
        self.started = dict(started or {})  # by the weights of which some tiles are read
        self.couplings: dict[str, Couplings] = {}  # the same
        self.feedbacks: dict[str, Feedback | None] = {}  # the same, where the outcome keeps its format
        self.whole: dict[str, Tensor] = {}  # the same, where it was merged whole

    def sites(self) -> Iterable[Site]:
        return [change.site for change in self.changes.values()]

    def reads(self, tensor: str) -> Sequence[str]:
        """The tensors of the source that one of the outcome depends on."""
        return reads_of(self.written, tensor)

    def load(self, site: Site, rows: slice | None = None) -> Packed:
        """ValueRangeError where the base or the outcome is not finite."""
        change, rows = self.changes[site.name], site.rows(rows)
        if change.as_peft is None:
            change, started = self._begun(change, rows)
            if change.keep:
                return self._kept(change, rows, started)
            original, begin = _opened(self.source, change, rows)
            outcome, steps = _outcome(change, rows, begin, started)
        else:
            original, begin = _opened(self.source, change, rows)
            outcome, steps = Rounding(self._cut(change, change.as_peft, rows)), None
        merged = outcome.values
        if not all_finite(merged):
            raise _non_finite(change, begin.tensors["weight"], merged)
        if self.watch is not None:
            before = None if original is None else original.tensors["weight"]
            chained = None if change.saved is not None or change.new else steps
            self.watch(MergedTile(change, rows, before, merged, chained, near_ties=outcome.near_ties))
        return Packed({"weight": merged})

    def exact(self, site: Site, rows: slice) -> tuple[Tensor, Tensor]:
        """Rows of a weight as it was, and of the merge before any rounding, in float64; rows are asked for in order."""
        change, started = self._begun(self.changes[site.name], rows)
        original, begin = _opened(self.source, change, rows)
        laid, _ = _lay(change, rows, _decoded(change, begin), started)
        if not all_finite(laid):
            raise _non_finite(change, begin.tensors["weight"], laid)
        return _decoded(change, begin if original is None else original), laid.to(torch.float64)

    def _kept(self, change: Change, rows: slice, started: Started) -> Packed:
        """The codes alone: what else holds the weight stays as it is."""
        packed = self.source.load(change.site, rows)
        codec = codec_of(packed, printable(change.site.weight.name))
        before = codec.decode(packed, torch.float64)
        laid, _ = _lay(change, rows, before.clone(), started)
        if not all_finite(laid):
            raise _non_finite(change, before, laid)
        outcome = rounded(codec, laid, packed, self._feedback(change, rows, started))
        after = codec.decode(outcome, torch.float64)
        if self.watch is not None:
            self.watch(MergedTile(change, rows, before, after, None, laid))
        return Packed({"weight": outcome.tensors[next(iter(codec.endings))]})

    def _feedback(self, change: Change, rows: slice, started: Started) -> Feedback | None:
        """That of the weight, kept until its last rows."""
        name = change.site.name
        if name not in self.feedbacks:
            self.feedbacks[name] = feedback_of(change, started)
        return self.feedbacks.pop(name) if ends(change.site, rows) else self.feedbacks[name]

    def _begun(self, change: Change, rows: slice) -> tuple[Change, Started]:
        """The layers with what these rows need of them; forgotten after the last rows."""
        name = change.site.name
        if name not in self.started:
            self.started[name] = change.started()
        started = self.started[name]
        if coupled(change.layers):
            change, started = self._told(change, rows, started)
        if ends(change.site, rows):
            del self.started[name]
            self.couplings.pop(name, None)
        return change, started

    def _cut(self, change: Change, merge: PeftMerge, rows: slice) -> Tensor:
        """These rows of a weight that is merged whole."""
        name = change.site.name
        if name not in self.whole:
            begin = _opened(self.source, change, change.site.rows(None))[1].tensors["weight"]
            self.whole[name] = merge(begin, change.layers, change.site).to(change.dtype)
        whole = self.whole.pop(name) if ends(change.site, rows) else self.whole[name]
        return whole[rows]

    def _told(self, change: Change, rows: slice, started: Started) -> tuple[Change, Started]:
        """Both with layers that know the sums that these rows need."""
        if change.site.name not in self.couplings:
            self.couplings[change.site.name] = Couplings(change.site, started, change.beside)
        couplings = self.couplings[change.site.name]
        with told_where(change.site):
            started = couplings.told(rows, lambda part: self._summed(change, part))
        layers = [one._replace(sums=found.sums) for one, (found, _) in zip(change.layers, started, strict=True)]
        return replace(change, layers=tuple(layers)), started

    def _summed(self, change: Change, rows: slice) -> Tensor:
        """Rows of the weight whose sums the layers ask for, in float64."""
        beside = change.beside
        begin = _opened(self.source, change, rows)[1] if beside is None else plainly(self.source, beside, rows)
        return _decoded(change, begin)


def told(source: Source, change: Change) -> Change:
    """The change whose layers know all sums that they ask for, where a single tile would not tell them."""
    site = change.site
    if not coupled(change.layers) or site.acting.tile(site.rows(None))[1] == slice(None):
        return change
    return Merged(source, [change])._told(change, site.rows(None), change.started())[0]


def plainly(source: Source, site: Site, rows: slice | None = None) -> Packed:
    """A weight of a source, or some rows of it, as one plain tensor: in its own dtype, or decoded to the site's."""
    packed = source.load(site, rows)
    codec = codec_of(packed, printable(site.weight.name))
    return packed if codec.name == "plain" else Packed({"weight": codec.decode(packed, site.weight.torch_dtype)})


def _opened(source: Source, change: Change, rows: slice) -> tuple[Packed | None, Packed]:
    """The host's own rows, if it has them, and what the layers are laid over."""
    original = None if change.origin is None else plainly(source, change.origin, rows)
    return original, _begin(change, original, rows)


def _decoded(change: Change, packed: Packed) -> Tensor:
    return codec_of(packed, printable(change.site.weight.name)).decode(packed, torch.float64)


def _begin(change: Change, original: Packed | None, rows: slice) -> Packed:
    """What the layers are laid over."""
    if change.saved is None:
        assert original is not None
        return original
    shape = change.site.laid(change.site.weight).shape
    return Packed({"weight": change.saved.view(shape)[rows if shape else ...]})


def _lay(change: Change, rows: slice, weight: Tensor, started: Started) -> tuple[Tensor, list[Elementwise] | None]:
    """The layers over `weight`, in float64, whose memory is used up; and the steps that lead there."""
    steps = elementwise(change, rows, started)
    if steps is not None:
        return accumulate_onto(weight, steps), steps
    op = change.site.acting
    for layer, product in started:
        base = Dense(op.matrix(weight))
        with told_where(change.site):
            weight = op.stored(layer.method.merge(base, layer.told, op.tile(rows), product).weight)
    return weight, None


def _outcome(
    change: Change, rows: slice, begin: Packed, started: Started
) -> tuple[Rounding, Sequence[Elementwise] | None]:
    """What the layers make of it, and the steps that lead there."""
    if not change.layers and begin.tensors["weight"].dtype == change.dtype:
        return Rounding(begin.tensors["weight"]), ()
    laid, steps = _lay(change, rows, _decoded(change, begin), started)
    return rounding(laid.to(torch.float64), change.dtype), steps


def _non_finite(change: Change, begin: Tensor, merged: Tensor) -> ValueRangeError:
    """`begin` is what the layers are laid over."""
    begins = "the weight that the adapter brings" if change.saved is not None else "the base weight"
    what, values = ("the merged weight", merged) if all_finite(begin) else (begins, begin)
    dtype, source = str(values.dtype).removeprefix("torch."), "adapter" if change.saved is not None else "base"
    return ValueRangeError(
        f"{printable(change.site.name)}: {what} holds NaN or infinity in {dtype}; "
        f"finite numbers are wanted; check the {source}, or choose a `dtype` of wider range"
    )
