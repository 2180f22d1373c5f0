"""Which parameters of a host the tensors of an adapter are for: PEFT's files name the modules that hold them.

Of several parameters of one module, the tensors of the last are at the module's name, those of each before it one
`base_layer` further in, in the order in which the module holds them.
"""

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence

from surgery.core.adapter import Adapter
from surgery.core.config import AdapterConfig
from surgery.core.names import suffix_hits
from surgery.core.select import refuse_unmatched
from surgery.core.site import Site
from surgery.errors import FormatError, MatchError, printable
from surgery.layers import Adapted, Replaced
from surgery.procedures.places.model_tree import Tree

_INNER = ".base_layer"
ORDER = (
    *("gate_up_proj", "gate_up_proj_bias", "up_proj", "up_proj_bias", "down_proj", "down_proj_bias"),
    *("q_proj_weight", "k_proj_weight", "v_proj_weight"),
)
"""In which modules of transformers and torch hold these, whichever they have."""
MATRICES = frozenset(name for name in ORDER if name.endswith(("_bias", "_weight")))
"""Those that have two axes: the biases of all experts, and the projections of an attention."""


def module_of(name: str) -> str:
    """The module that a site's name tells, as the adapter calls it."""
    while name.endswith(_INNER):
        name = name.removesuffix(_INNER)
    return name


def owners(adapter: Adapter) -> dict[str, list[str]]:
    """By module, the names of its sites from the innermost on; nothing where the adapter is of modules alone."""
    found: dict[str, list[str]] = {}
    for name in sorted(adapter.sites, key=len, reverse=True) if adapter.config.parameters() else ():
        found.setdefault(module_of(name), []).append(name)
    return found


def assigned(adapter: Adapter, held: Callable[[str, Sequence[str]], Sequence[str]]) -> dict[str, str]:
    """By the names of the sites that are parameters, the parameters: module and own name.

    `held` gives for a module and its sites, from the innermost on, its targeted parameters in as many; none for one
    that is adapted as a whole.
    """
    found: dict[str, str] = {}
    for module, names in owners(adapter).items():
        own = held(module, names)
        if len(own) not in (0, len(names)):
            raise FormatError(
                f"{printable(adapter.where)}: {printable(module)}: target_parameters means {', '.join(own)}, and there "
                f"are tensors for {len(names)}; the file is incomplete, or of another model"
            )
        found |= {name: f"{module}.{one}" for name, one in zip(names, own, strict=False)}
    return found


def spelled_without_model(parameters: Iterable[str]) -> dict[str, str]:
    """By parameter, the site that PEFT's files have for it. MatchError where no order of its module's is known."""
    by_module: dict[str, list[str]] = {}
    for name in parameters:
        module, _, own = name.rpartition(".")
        by_module.setdefault(module, []).append(own)
    found = {}
    for module, held in by_module.items():
        for inner, own in enumerate(reversed(in_order(module, held))):
            found[f"{module}.{own}"] = module + _INNER * inner
    return found


def in_order(module: str, held: Sequence[str]) -> list[str]:
    """Parameters of a module in the order in which it holds them. MatchError where that is not known."""
    if len(held) > 1 and not set(held) <= set(ORDER):
        raise MatchError(
            f"{printable(module)}: {', '.join(map(printable, held))} are adapted, which files tell apart by the "
            "module's order alone, and no model is here to tell it; one of them is wanted; merge in the model, with "
            "surgery.load and surgery.merge"
        )
    return sorted(held, key=ORDER.index) if len(held) > 1 else list(held)


def targeted(adapter: Adapter, module: str, held: Mapping[str, object]) -> list[str]:
    """Of the parameters that a module holds, those that the config names."""
    entries = frozenset(adapter.config.parameters())
    return [own for own in held if suffix_hits(entries, f"{module}.{own}")]


def targeted_parameters(config: AdapterConfig, tree: Tree) -> list[str]:
    """The parameters that `target_parameters` hits, in the order of the modules; MatchError for one that hits none."""
    entries = frozenset(config.parameters())
    if not entries:
        return []
    names = tree.parameter_names()
    hits = {name: found for name in names if (found := suffix_hits(entries, name))}
    refuse_unmatched("target_parameters", sorted(entries - {one for found in hits.values() for one in found}), names)
    for own in tree.root._parameters:
        if own in entries:
            raise MatchError(
                f"target_parameters: {printable(own)} is held by the model itself, which nothing can be put around; "
                "put the model into another module, or name fewer"
            )
    return list(hits)


def refuse_nested(tree: Tree, sites: Mapping[str, Site], saved: Collection[str]) -> None:
    """MatchError where a module one of whose parameters is adapted is, or holds, what is adapted or replaced too."""
    owners = {name.rpartition(".")[0] for name, site in sites.items() if site.acting.alone}
    owners |= {name.rpartition(".")[0] for name in tree.alone}
    if not owners:
        return
    there = [name for name, module in tree.modules.items() if isinstance(module, Adapted | Replaced)]
    given = [name for name, site in sites.items() if not site.acting.alone]
    for name in (*given, *saved, *there):
        if owner := next((one for one in _upwards(name) if one in owners), None):
            raise _nested(owner, name)
    for name in owners:
        outer = name.rpartition(".")[0]
        if owner := next((one for one in _upwards(outer) if one in owners or one in saved), None):
            raise _nested(owner, name)


def _nested(owner: str, name: str) -> MatchError:
    return MatchError(
        f"{printable(owner)}: parameters of it are adapted, and so is {printable(name)}; a module or parameters of it "
        "are wanted, and nothing within it; name the one or the other"
    )


def _upwards(name: str) -> Iterator[str]:
    """A path, and those that it lies in."""
    while name:
        yield name
        name = name.rpartition(".")[0]
