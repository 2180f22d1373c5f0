"""Shared: an embedding that files hold once, as `shared`, and a model in several modules: T5's, BART's and their like.

Encoder, decoder and output head each have a module of their own over its memory; `shared` itself may run nowhere.
"""

from collections.abc import Collection, Iterable, Sequence
from typing import NamedTuple

from surgery.core.adapter import Layer
from surgery.core.site import Site, TensorInfo
from surgery.core.turned import EMBEDDING, is_tied
from surgery.errors import MatchError, printable
from surgery.hosts.checkpoint import Checkpoint
from surgery.procedures.places.tying import is_embedding, tying_of

_OWN = "shared"
_SIDES = ("encoder", "decoder")


class Shared(NamedTuple):
    """The tensor, and the modules that it is besides, as files would call them."""

    embedding: TensorInfo
    modules: Sequence[str]
    runs: bool = False  # does the module that files have it under, too?

    @property
    def own(self) -> str:
        """The module that files have it under."""
        return self.embedding.name.rpartition(".")[0]

    def sites(self) -> dict[str, Site]:
        """Of all the modules, each with the one tensor."""
        return {name: Site(name, {"weight": self.embedding}) for name in (self.own, *self.modules)}


Laid = tuple[Site, Layer]


def shared_of(base: Checkpoint) -> Shared | None:
    """None where there is no such embedding, or every module has a tensor of its own."""
    found = [info for info in base.weights() if _is_shared(info)]
    if len(found) != 1:
        return None
    before = found[0].name.removesuffix(f"{_OWN}.weight")
    names = [info.name for info in base.weights()]
    sides = [one for one in _SIDES if any(name.startswith(f"{before}{one}.") for name in names)]
    modules = [f"{before}{side}.embed_tokens" for side in sides]
    tying = tying_of(base)
    heads = [] if tying is None or tying.embedding.name != found[0].name else [tying.head.name]
    absent = [name for name in (*modules, *heads) if base.info(f"{name}.weight") is None]
    return Shared(found[0], absent) if absent else None


def shared_in_memory(base: Checkpoint, asked: Collection[str]) -> Shared | None:
    """One that a module of `asked` is, and files lack, as transformers ties them: FSMT's, or a head's own in BLT.

    None where it is an embedding and a single head, of which tying tells.
    """
    ties = base.ties() if asked else {}
    owners = {owner for name, owner in ties.items() if name.rpartition(".")[0] in asked and base.info(owner)}
    if len(owners) != 1:
        return None
    (owner,) = owners
    others = sorted(name.rpartition(".")[0] for name, one in ties.items() if one == owner and base.info(name) is None)
    info = base.info(owner)
    return None if info is None or (len(others) == 1 and is_embedding(owner)) else Shared(info, others, runs=True)


def laid_on_all(shared: Shared, laid: Sequence[Laid], where: str) -> Laid:
    """What lies over the embedding, where the same lies over each of the modules. MatchError where it does not.

    A module that does not run may be left out.
    """
    names = [site.name for site, _ in laid]
    running = [*shared.modules, *([shared.own] if shared.runs else [])]
    missing = [name for name in running if name not in names]
    first = next(((site, layer) for site, layer in laid if site.acting.name == EMBEDDING), None)
    if missing or first is None or not all(_is_as(first[1], site, layer) for site, layer in laid):
        told = f"leaves {', '.join(map(printable, missing))} alone" if missing else "has not the same for each"
        raise MatchError(
            f"{printable(shared.embedding.name)}: in the model it is {_listed(shared.modules)} too, and "
            f"{printable(where)} adapts {_listed(names)}: it {told}; train one for all with ensure_weight_tying, or "
            "save the base with these apart first"
        )
    return first[0], first[1]


def _is_shared(info: TensorInfo) -> bool:
    return len(info.shape) == 2 and info.name.split(".")[-2:] == [_OWN, "weight"]


def _is_as(first: Layer, site: Site, layer: Layer) -> bool:
    turns = site.acting.name == EMBEDDING or layer.method.turns
    return turns and layer.method == first.method and is_tied(site.acting, layer.params, first.params)


def _listed(names: Iterable[str]) -> str:
    return ", ".join(map(printable, names))
