"""Ties: what becomes of an embedding and the output head that is tied to it, where adapters change one or both.

Told what the adapters make of each, these functions return what that comes to; they change nothing.
"""

from collections.abc import Collection, Mapping, Sequence, Set
from dataclasses import dataclass, replace
from typing import NamedTuple

from torch import Tensor

from surgery.core.site import Site, TensorInfo
from surgery.core.turned import is_turned
from surgery.errors import MatchError, printable
from surgery.hosts.change import Change
from surgery.hosts.checkpoint import Checkpoint
from surgery.hosts.views import plainly
from surgery.procedures.places.tying import Tying, ties_head, vocabulary
from surgery.procedures.planning.wholes import same


@dataclass(frozen=True)
class Tied:
    """An embedding and its head, with what the adapters make of each; None is nothing."""

    base: Checkpoint
    tying: Tying
    embedding: Change | None
    head: Change | None
    resized: bool  # the embedding begins as an adapter's copy of the resized base
    shared: Set[int] = frozenset()  # adapters of which one layer changes all modules that share the embedding

    @property
    def begins(self) -> Tensor:
        """What the embedding becomes, layers aside."""
        if self.embedding is not None and self.embedding.saved is not None:
            return self.embedding.saved
        return plainly(self.base, _site(self.tying.embedding)).tensors["weight"]

    @property
    def turned(self) -> bool:
        """Has the head, which begins as the embedding, its factors, turned, in each layer?"""
        e, h = self.embedding, self.head
        if e is None or h is None or not e.layers or len(e.layers) != len(h.layers):
            return False
        if (e.saved, h.saved) != (None, None) and not same(h.saved, self.begins):
            return False
        return all(
            one.method == other.method and is_turned(other.params, one.params)
            for one, other in zip(e.layers, h.layers, strict=True)
        )


class Settled(NamedTuple):
    """What becomes of the two."""

    head: Change | None  # how the head is written; None leaves it as it was
    untied: bool = False  # the two no longer hold the same
    turned: bool = False  # they do, though layers lie over both: the head's are those of the embedding, turned
    refusal: MatchError | None = None
    note: str = ""


def settle_absent(pair: Tied, untie: bool) -> Settled:
    """Where the files lack the head: it changes as its embedding does, or, if `untie`, is written apart."""
    e, h, tying = pair.embedding, pair.head, pair.tying
    if pair.turned:
        note = (
            f"{tying.head.weight.name}: it has the factors of {printable(tying.embedding.name)}, and stays tied to it"
        )
        return Settled(None, turned=True, note=note)
    if h is not None and not h.layers and same(h.saved, pair.begins):
        h = None
    if h is None and _follows(pair):
        return Settled(None)
    if not untie or not tying.separable:
        return Settled(h, refusal=_one_alone(tying, e, h))
    if h is None and e is not None and e.new and not pair.resized:
        return Settled(h, refusal=_no_head(tying))
    return Settled(_apart(pair, h), untied=True)


def settle_held(pair: Tied) -> Settled:
    """Where the files hold a head that config.json ties: changed apart from the embedding, it has to be read."""
    e, h, tying = pair.embedding, pair.head, pair.tying
    embedding, head = tying.embedding.name, tying.head.weight.name
    turned = pair.turned
    (name, change), other = ((embedding, e), head) if h is None else ((head, h), embedding)
    if (e is None) != (h is None) and change is not None and _of_rows(change):
        return Settled(h, turned=turned, refusal=_rows_of_one(name, other))
    if change is None or not tying.separable:
        return Settled(h, turned=turned)
    saved = e is not None and h is not None and e.saved is not None and same(h.saved, e.saved)
    return Settled(h, untied=not (saved or turned), turned=turned)


def hidden_ties(
    base: Checkpoint, changes: Mapping[str, Change], resized: Collection[str], shared: Set[int]
) -> list[MatchError]:
    """Refusals where it is not clear which tensor is the embedding: what may be tied to an absent head has to stay.

    So has what others are known to be tied to, unless it is `resized` with them, or `shared` adapters change all.
    """
    known, found = vocabulary(base), []
    for name, change in changes.items():
        embeds = name in known or (change.site.op is not None and change.site.op.name == "embedding")
        info = base.info(name)
        if not embeds or info is None or _of_rows(change) or (change.layers and _all_follow(change, False, shared)):
            continue
        unknown = ties_head(base, info)
        if unknown or not _all_follow(change, name in resized, shared):
            others = _followers(base, name)
            found += [] if all(other in changes for other in others) else [_followed(name, others)]
            found += [_head_unknown(name)] if unknown and not others else []
    return found


def _all_follow(change: Change, resized: bool, shared: Set[int]) -> bool:
    """Does it become what all modules that share it become?"""
    if not change.layers:
        return resized
    return {one.adapter for one in change.layers if not one.method.replaced_rows} <= shared  # PEFT replaces rows in all


def _followers(base: Checkpoint, name: str) -> list[str]:
    """The tensors that are tied to one in memory, and that the files lack."""
    ties = base.ties()
    there = base.called()(name) if ties else name
    return sorted(other for other, one in ties.items() if one == there and base.info(other) is None)


def _follows(pair: Tied) -> bool:
    """Does a head that is nothing of its own stay tied, whatever its embedding becomes?"""
    e = pair.embedding
    if e is None or not e.layers:
        return e is None or pair.resized or pair.head is not None  # the base's, grown, or replaced alike
    return _all_follow(e, pair.resized, pair.shared)


def _apart(pair: Tied, h: Change | None) -> Change:
    """The head, which begins as the embedding did."""
    if h is not None and h.saved is not None:
        return h
    e, tying = pair.embedding, pair.tying
    grown = e if pair.resized else None
    info = tying.head.weight._replace(shape=tying.embedding.shape if grown is None else grown.site.weight.shape)
    change = h or Change(_site(info), info.torch_dtype, new=True)
    if grown is not None:
        return replace(change, saved=grown.saved)
    return replace(change, begins=_site(tying.embedding))


def _of_rows(change: Change) -> bool:
    """Are single rows replaced, and no more?"""
    return bool(change.layers) and all(layer.method.replaced_rows for layer in change.layers)


def _site(info: TensorInfo) -> Site:
    return Site(info.name, {"weight": info})


def _one_alone(tying: Tying, e: Change | None, h: Change | None) -> MatchError:
    """What the adapters make of two that are tied is not the same."""
    embedding, head = printable(tying.embedding.name), printable(tying.head.weight.name)
    step = "`tied=untie` writes them apart" if tying.separable else "save the base with the two apart first"
    if e is not None and h is not None:
        return MatchError(f"{head}: it is tied to {embedding}, and the adapters make another tensor of each; {step}")
    one, other = (embedding, head) if h is None else (head, embedding)
    return MatchError(f"{one}: it is tied to {other}, and only it is adapted; {step}")


def _head_unknown(name: str) -> MatchError:
    return MatchError(
        f"{printable(name)}: the output head, which the base does not hold, may be tied to it; "
        "save the base with tie_word_embeddings=false first"
    )


def _followed(name: str, others: Sequence[str]) -> MatchError:
    told = f"{', '.join(map(printable, others))} {'is' if len(others) == 1 else 'are'} tied to it"
    return MatchError(
        f"{printable(name)}: {told}, and only it is adapted; train one for all with ensure_weight_tying, or save the "
        "base with them apart first"
    )


def _no_head(tying: Tying) -> MatchError:
    return MatchError(
        f"{tying.head.weight.name}: the adapter's embedding has grown, and it brings no head of that size"
    )


def _rows_of_one(name: str, other: str) -> MatchError:
    return MatchError(
        f"{printable(name)}: rows of it are replaced, and config.json ties {printable(other)} to it, which "
        "the files hold apart; set tie_word_embeddings to false there, or save the base with transformers"
    )
