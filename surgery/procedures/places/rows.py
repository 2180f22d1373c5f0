"""Rows: which modules of a model have single rows that an adapter replaces, PEFT's `trainable_token_indices`.

Modules that share a weight share its rows.
"""

from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch.nn import Parameter

from surgery.core.config import AdapterConfig
from surgery.core.method import Method, Params
from surgery.core.names import nearest, suffix_hits
from surgery.core.site import Site
from surgery.errors import MatchError, printable, quoted
from surgery.hosts.recognition import op_of
from surgery.layers import Adapted
from surgery.procedures.places.model_tree import Tree
from surgery.procedures.places.tying import EMBEDDINGS

FittedSite = tuple[Site, Method, Params]


def with_rows(tree: Tree, config: AdapterConfig, adapted: Collection[str]) -> tuple[AdapterConfig, list[str]]:
    """The config with these modules in full, and their paths. MatchError for one that is not there, or adapted too."""
    entries = config.rows()
    if entries is not None and not entries:
        return config, []
    if entries is None:
        found = {_embedding(tree, "trainable_token_indices")}
    else:
        found = {tree.first_name(name) for name in tree.modules if suffix_hits(entries, name)}
        for entry in entries:
            if not any(suffix_hits((entry,), name) for name in tree.modules):
                close = ", ".join(map(printable, nearest(entry, tree.modules)))
                raise MatchError(f"trainable_token_indices: nothing matches {quoted(entry)}; nearest: {close}")
    for name in sorted(found & {*adapted}):
        raise MatchError(
            f"{printable(name)}: trainable_token_indices and target_modules both name it, which PEFT refuses too; "
            "leave one out"
        )
    return config.with_rows(sorted(found)), sorted(found)


def with_embedding(tree: Tree, config: AdapterConfig) -> AdapterConfig:
    """The config, with the embedding named where it adapts nothing but rows, and leaves it to the model of what."""
    alone = config.repeats_rows and config.rows() is None
    return config.with_rows([_embedding(tree, "target_modules is not given")]) if alone else config


def with_tied_rows(tree: Tree, sites: Mapping[str, FittedSite], saved: Collection[str]) -> dict[str, FittedSite]:
    """Besides, what is tied to weights whose rows are replaced: as in PEFT the same rows stand there.

    MatchError where that cannot be, or a weight is replaced whole.
    """
    found = dict(sites)
    for name, (_, method, params) in sites.items():
        if not method.replaced_rows:
            continue
        if any(name == other or name.startswith(f"{other}.") for other in saved):
            raise MatchError(f"{printable(name)}: trained rows and modules_to_save both name it; leave one out")
        for other in tree.tied_to(name):
            if other in sites and not same_rows(sites[other], method, params):
                raise MatchError(
                    f"{printable(other)}: its weight is tied to {printable(name)}, and the adapter makes something "
                    "else of it; leave one of the two out, or untie them first"
                )
            site = tree.site(other)
            method.tensors(site)
            found[other] = site, method, params
    return found


def refuse_missing(config: AdapterConfig, names: Collection[str], where: str) -> None:
    """MatchError where rows that the config speaks of are not in the file, and no tied weight has them."""
    for entry in config.rows() or ():
        if not any(suffix_hits((entry,), name) or suffix_hits((name,), entry) for name in names):
            raise MatchError(
                f"{printable(where)}: the rows of {printable(entry)} are not in it, as PEFT leaves them out where "
                "it is tied to another weight, which it is not here; load a base with tied weights"
            )


def share_rows(tree: Tree, adapter: str, sites: Mapping[str, FittedSite]) -> None:
    """Rows of tied weights are one parameter."""
    held: dict[int, Parameter] = {}
    for name, (_, method, _) in sites.items():
        if method.replaced_rows:
            layer: Any = tree.modules[name]
            holder, key = layer.fitted[adapter].holders["t"]
            first = holder[key]
            assert first is not None
            holder[key] = held.setdefault(id(layer.base_weight), first)


def repeats(layers: Mapping[str, Adapted], adapter: str) -> set[str]:
    """Of the layers that it lies over, those that only share the rows of one before them."""
    seen: set[int] = set()
    found = set()
    for name, layer in layers.items():
        one = layer.fitted.get(adapter)
        if one is not None and one.method.replaced_rows:
            key = id(one.params["t"])
            found |= {name} if key in seen else set()
            seen.add(key)
    return found


def merged_once(layers: Mapping[str, Adapted]) -> set[str]:
    """Layers whose weight is another's, where just the same rows are replaced: to merge one of them is enough."""
    seen: set[tuple[int, ...]] = set()
    found = set()
    for name, layer in layers.items():
        fitted = [layer.fitted[adapter] for adapter in layer.active]
        if all(one.method.replaced_rows for one in fitted):
            key = id(layer.base_weight), *(id(one.params["t"]) for one in fitted)
            found |= {name} if key in seen else set()
            seen.add(key)
    return found


def same_rows(site: FittedSite, method: Method, params: Params) -> bool:
    """Do the two replace the same rows by the same numbers?"""
    _, other, rows = site
    return other == method and rows["t"].shape == params["t"].shape and torch.equal(rows["t"], params["t"])


def _embedding(tree: Tree, what: str) -> str:
    """The one embedding of tokens that is called as usual."""
    found = {tree.first_name(name) for name in tree.modules if _embeds(tree, name)}
    if len(found) != 1:
        told = ", ".join(map(printable, sorted(found))) or "none is called as usual"
        raise MatchError(f"{what}: one embedding of tokens is wanted, and here {told}; name its module")
    return found.pop()


def _embeds(tree: Tree, name: str) -> bool:
    op = op_of(tree.plain(name))
    return name.rpartition(".")[2] in EMBEDDINGS and op is not None and op.name == "embedding"
