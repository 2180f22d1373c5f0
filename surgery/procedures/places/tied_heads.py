"""Tied heads: PEFT's `ensure_weight_tying` where an embedding is adapted whose weight other modules hold too.

All change alike: another embedding has the factors of the first one, and a linear map, such as the output head, has A
and B of it turned and in each other's place.
"""

from collections.abc import Iterable, Mapping

from surgery.core.config import AdapterConfig
from surgery.core.turned import EMBEDDING, is_tied, tied
from surgery.errors import ConfigError, MatchError, printable
from surgery.hosts.recognition import op_of
from surgery.layers import Adapted
from surgery.layers.running import Tied
from surgery.procedures.places.model_tree import Tree
from surgery.procedures.places.rows import FittedSite

Heads = Mapping[str, str]  # by what is tied, such as the head, the embedding whose factors it has


def tied_heads(tree: Tree, config: AdapterConfig, adapted: Iterable[str]) -> Heads:
    """Those of weights that one of the `adapted` holds. MatchError where they cannot have the same factors."""
    found: dict[str, str] = {}
    for name in adapted if config.ties() else ():
        group = [name, *tree.tied_to(name)] if name in tree.modules and name not in found else []
        if len(group) > 1:
            embedding = _first(tree, group)
            method = config.method(embedding)
            heads = [one for one in group if one != embedding]
            for head in heads:
                if not method.turns or config.method(head) != method:
                    raise MatchError(
                        f"{printable(head)}: ensure_weight_tying, and its weight is tied to {printable(embedding)}; "
                        "both have the factors of one plain LoRA, of the same r and alpha; change the config, or untie "
                        "them first"
                    )
            found |= dict.fromkeys(heads, embedding)
    return found


def agreeing_heads(tree: Tree, config: AdapterConfig, sites: Mapping[str, FittedSite]) -> Heads:
    """Those whose factors are, in a file, those of their embedding.

    PEFT trains them apart in a half type, adapts one alone that is called otherwise than embed_tokens, and gives
    another embedding factors of its own.
    """
    found: dict[str, str] = {}
    ordered = [name for name in tree.modules if name in sites] if config.ties() else []
    for name in ordered:
        site, method, params = sites[name]
        if site.acting.name == EMBEDDING and method.turns and name not in found:
            others = [other for other in tree.tied_to(name) if other in sites and other not in found]
            for other in others:
                there, same, held = sites[other]
                if same == method and is_tied(there.acting, held, params):
                    found[other] = name
    return found


def with_heads(tree: Tree, sites: Mapping[str, FittedSite], heads: Heads) -> dict[str, FittedSite]:
    """Besides, each head with the factors of its embedding."""
    found = dict(sites)
    for head, embedding in heads.items():
        _, method, params = sites[embedding]
        site = tree.site(head)
        found[head] = site, method, tied(site.acting, params)
    return found


def lay_head(tree: Tree, adapter: str, head: str, embedding: str, fitted: FittedSite) -> Adapted:
    """Let a head have the factors that the embedding holds of an adapter."""
    site, method, _ = fitted
    source = tree.modules[embedding]
    assert isinstance(source, Adapted)
    layer = tree.layer(head, site)
    layer.fitted[adapter] = Tied(method, source.fitted[adapter].holders, {}, of=embedding, op=site.acting)
    return layer


def merged_with_embedding(layers: Mapping[str, Adapted]) -> set[str]:
    """What has over it just what lies over the embedding that it is tied to: to merge that is enough."""
    found = set()
    for name, layer in layers.items():
        fitted = [layer.fitted[adapter] for adapter in layer.active]
        source = layers.get(next((one.of for one in fitted if isinstance(one, Tied)), ""))
        if source is not None and source.active == layer.active and all(isinstance(one, Tied) for one in fitted):
            found.add(name)
    return found


def unlike_peft(where: str) -> ConfigError:
    """Why a merge of tied heads has no bits of PEFT."""
    return ConfigError(
        f"{where}: ensure_weight_tying, and PEFT's merge adds the delta of tied weights twice, or unties them; give "
        "`arithmetic=exact`"
    )


def _first(tree: Tree, group: list[str]) -> str:
    """The embedding that the others have their factors of. MatchError unless all look up or multiply."""
    ops = {name: op_of(tree.plain(name)) for name in group}
    named = {name: "other" if op is None else op.name for name, op in ops.items()}
    if set(named.values()) <= {EMBEDDING, "linear"} and EMBEDDING in named.values():
        return next(name for name in tree.modules if named.get(name) == EMBEDDING)
    others = ", ".join(map(printable, group[1:]))
    raise MatchError(
        f"{printable(group[0])}: ensure_weight_tying, and its weight is tied to {others}; Embeddings and Linears are "
        "wanted, an Embedding among them; leave it out of target_modules, or untie them first"
    )
