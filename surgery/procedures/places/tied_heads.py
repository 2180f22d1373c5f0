"""Tied heads: PEFT's `ensure_weight_tying` where an embedding is adapted whose weight an output head holds too.

Both weights change alike: the head's A and B are those of the embedding, turned and in each other's place.
"""

from collections.abc import Iterable, Mapping

from surgery.core.config import AdapterConfig
from surgery.core.turned import is_turned, turned
from surgery.errors import ConfigError, MatchError, printable
from surgery.hosts.recognition import op_of
from surgery.layers import Adapted
from surgery.layers.running import Turned
from surgery.methods.lora import Lora
from surgery.procedures.places.model_tree import Tree
from surgery.procedures.places.rows import FittedSite

Heads = Mapping[str, str]  # by the head, the embedding


def tied_heads(tree: Tree, config: AdapterConfig, adapted: Iterable[str]) -> Heads:
    """Those of embeddings of which one of the two is adapted. MatchError where they cannot have the same factors."""
    found = {}
    for name in adapted if config.ties() else ():
        group = [name, *tree.tied_to(name)] if name in tree.modules else []
        if len(group) > 1:
            embedding, head = _pair(tree, group)
            methods = config.method(embedding), config.method(head)
            if type(methods[0]) is not Lora or methods[0] != methods[1]:
                raise MatchError(
                    f"{printable(head)}: ensure_weight_tying, and its weight is tied to {printable(embedding)}; both "
                    "have the factors of one plain LoRA, of the same r and alpha; change the config, or untie them "
                    "first"
                )
            found[head] = embedding
    return found


def agreeing_heads(tree: Tree, config: AdapterConfig, sites: Mapping[str, FittedSite]) -> Heads:
    """Those whose factors are, in a file, those of their embedding.

    PEFT trains the two apart in a half type, and adapts one alone that is called otherwise than embed_tokens.
    """
    found = {}
    for name in sites if config.ties() else ():
        for head in tree.tied_to(name) if name in tree.modules else ():
            if head in sites and sites[head][1] == sites[name][1] and is_turned(sites[head][2], sites[name][2]):
                found[head] = name
    return {head: name for head, name in found.items() if sites[name][0].acting.name == "embedding"}


def with_heads(tree: Tree, sites: Mapping[str, FittedSite], heads: Heads) -> dict[str, FittedSite]:
    """Besides, each head with the factors of its embedding."""
    found = dict(sites)
    for head, embedding in heads.items():
        _, method, params = sites[embedding]
        found[head] = tree.site(head), method, turned(params)
    return found


def lay_head(tree: Tree, adapter: str, head: str, embedding: str, fitted: FittedSite) -> Adapted:
    """Let a head have the factors that the embedding holds of an adapter."""
    site, method, _ = fitted
    source = tree.modules[embedding]
    assert isinstance(source, Adapted)
    A, B = (source.fitted[adapter].holders[role] for role in "AB")
    layer = tree.layer(head, site)
    layer.fitted[adapter] = Turned(method, {"A": A, "B": B}, {}, of=embedding)
    return layer


def merged_with_embedding(layers: Mapping[str, Adapted]) -> set[str]:
    """Heads over which lies just what lies over their embeddings, turned: to merge these is enough."""
    found = set()
    for name, layer in layers.items():
        fitted = [layer.fitted[adapter] for adapter in layer.active]
        source = layers.get(next((one.of for one in fitted if isinstance(one, Turned)), ""))
        if source is not None and source.active == layer.active and all(isinstance(one, Turned) for one in fitted):
            found.add(name)
    return found


def unlike_peft(where: str) -> ConfigError:
    """Why a merge of tied heads has no bits of PEFT."""
    return ConfigError(
        f"{where}: ensure_weight_tying, and PEFT's merge adds the delta of tied weights twice, or unties them; leave "
        "arithmetic 'exact'"
    )


def _pair(tree: Tree, group: list[str]) -> tuple[str, str]:
    """The embedding and the head. MatchError unless they are one of each."""
    ops = {name: op_of(tree.plain(name)) for name in group}
    named = {"other" if op is None else op.name: name for name, op in ops.items()}
    if len(group) == len(named) and named.keys() == {"embedding", "linear"}:
        return named["embedding"], named["linear"]
    others = ", ".join(map(printable, group[1:]))
    raise MatchError(
        f"{printable(group[0])}: ensure_weight_tying, and its weight is tied to {others}; an Embedding and a Linear "
        "are wanted, which PEFT ties too; leave it out of target_modules, or untie them first"
    )
