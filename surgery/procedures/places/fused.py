"""An adapter of single experts as one of stacks, as a model holds them since version 5 of transformers, and some files.

Of an expert whose matrix is several of the adapter's, one below another, the ranks follow each other in A, and B has
their blocks on its diagonal: the same delta, in zeros and the very numbers.
"""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple, Protocol

from surgery.core.adapter import Adapter
from surgery.core.method import Additive, Params
from surgery.core.name_map import USUAL, Part
from surgery.errors import ConfigError, FormatError, MatchError, printable
from surgery.methods.lora_config import LoraConfig


class Holds(Protocol):
    """What may hold stacks: a model's tree, or a base."""

    def reads_itself(self, name: str) -> bool:
        """Is it a parameter that its module reads by itself?"""
        ...

    def shape(self, name: str) -> tuple[int, ...]: ...


class Piece(NamedTuple):
    """What an adapter has for one matrix of one expert, or for a parameter that is one matrix."""

    site: str
    part: Part | None
    params: Params
    method: Additive


def fused(tree: Holds, adapter: Adapter) -> Adapter:
    """The adapter with parameters of `tree` for sites, by their names, where its own are none of its modules.

    InputError for what no stack can hold.
    """
    config = adapter.config
    found: dict[str, list[Piece]] = {}
    for site in adapter.sites if isinstance(config, LoraConfig) and not config.parameters() else ():
        name = USUAL.rename(f"{site}.weight")
        part = USUAL.part(name)
        whole = name if part is None else part.whole
        if tree.reads_itself(whole):
            method = config.method(site)
            if not isinstance(method, Additive):
                raise FormatError(f"{printable(adapter.where)}: {printable(site)}: {_LACKS}")
            found.setdefault(whole, []).append(Piece(site, part, adapter.sites[site], method))
    if not found or not isinstance(config, LoraConfig):
        return adapter
    gone = {one.site for pieces in found.values() for one in pieces}
    sites = {name: params for name, params in adapter.sites.items() if name not in gone}
    sites |= {name: _whole(name, pieces, tree, printable(adapter.where)) for name, pieces in found.items()}
    return replace(adapter, sites=sites, config=_config(config, found, sites, tree, printable(adapter.where)))


_LACKS = (
    "these experts are held as one parameter, for which PEFT has no DoRA and no lora_bias; merge it into a "
    "checkpoint that holds them one by one, by surgery.merge_checkpoint"
)


def _whole(name: str, pieces: Sequence[Piece], tree: Holds, where: str) -> Params:
    """A and B for a parameter of the model; experts for which there is nothing have zeros."""
    if pieces[0].part is None:
        return pieces[0].params
    shape = tree.shape(name)
    experts, rows, columns = shape
    places = len(pieces[0].part.stack.parts)
    each, ranks = rows // places, _ranks(name, pieces, where)
    some, r = pieces[0].params["A"], sum(ranks.values())
    A, B = some.new_zeros(experts, r, columns), some.new_zeros(rows, r, experts)
    for site, part, params, _ in pieces:
        assert part is not None
        rank, first = ranks[part.place], sum(one for place, one in ranks.items() if place < part.place)
        given = tuple(params["A"].shape), tuple(params["B"].shape)
        if part.expert >= experts or given != ((rank, columns), (each, rank)):
            raise MatchError(
                f"{where}: {printable(site)}: A and B are {given}, which do not fit {printable(name)}, {list(shape)}; "
                "was it trained on another model?"
            )
        A[part.expert, first : first + rank] = params["A"]
        B[part.place * each : (part.place + 1) * each, first : first + rank, part.expert] = params["B"]
    return {"A": A.flatten(0, 1), "B": B.flatten(1)}


def _ranks(name: str, pieces: Sequence[Piece], where: str) -> Mapping[int, int]:
    """By place. MatchError where experts differ in them, or in how strongly they apply."""
    found = {(one.part.place, one.params["A"].shape[0]) for one in pieces if one.part is not None}
    if len(found) != len({place for place, _ in found}) or len({one.method.scaling for one in pieces}) > 1:
        raise MatchError(
            f"{where}: {printable(name)}: its experts have several ranks or alphas, and a stack has one; merge it into "
            "a checkpoint that holds them one by one, by surgery.merge_checkpoint"
        )
    return dict(sorted(found))


def _config(
    config: LoraConfig, found: Mapping[str, Sequence[Piece]], sites: Mapping[str, Params], tree: Holds, where: str
) -> LoraConfig:
    """With the parameters named, and a rank and an alpha for each. FormatError for settings that they cannot have."""
    ranks, alphas = {}, {}
    for name, pieces in found.items():
        shape, pattern = tree.shape(name), re.escape(name)
        r = sites[name]["A"].shape[0] // (shape[0] if len(shape) > 2 else 1)
        ranks[pattern], alphas[pattern] = r, _alpha(pieces[0].method.scaling, r, config.use_rslora)
    try:
        told = replace(
            config.with_parameters(list(found)),
            rank_pattern={**ranks, **config.rank_pattern},
            alpha_pattern={**alphas, **config.alpha_pattern},
        )
    except ConfigError as error:
        raise FormatError(
            f"{where}: {error}; lora_dropout may be set to 0 in it, which changes training alone"
        ) from error
    for name, pieces in found.items():
        method = told.method(name)
        if not isinstance(method, Additive) or method.scaling != pieces[0].method.scaling:
            raise FormatError(
                f"{where}: {printable(name)}: no lora_alpha gives a stack its scaling; leave use_rslora out"
            )
    return told


def _alpha(scaling: float, r: int, use_rslora: bool) -> float:
    """By which a stack of rank r has this scaling, if there is such a number."""
    divisor = math.sqrt(r) if use_rslora else r
    near = scaling * divisor
    candidates = (near, math.nextafter(near, math.inf), math.nextafter(near, -math.inf))
    return next((alpha for alpha in candidates if alpha / divisor == scaling), near)
