"""Fresh: the tensors that a new adapter starts with, of the base alone or of examples run through it."""

from collections.abc import Mapping
from functools import partial

from torch import Tensor

from surgery.codecs.formats import format_of
from surgery.core.config import AdapterConfig
from surgery.core.method import Method, Params
from surgery.core.site import Site
from surgery.core.starter import Observer, Starter
from surgery.errors import StateError, UsageError, printable
from surgery.hosts.quantized import is_quantized
from surgery.procedures.live.examples import Examples, observe
from surgery.procedures.places.model_tree import Tree

FittedSite = tuple[Site, Method, Params]


def fresh_sites(
    tree: Tree, config: AdapterConfig, spelled: Mapping[str, str], examples: Examples | None
) -> tuple[AdapterConfig, dict[str, FittedSite]]:
    """The adapter at each module, by name and as PEFT spells it; and its config, with the ranks that it was given.

    UsageError where examples are missing, or given and not needed.
    """
    sites = {name: tree.site(name) for name in spelled}
    starters = {name: config.starter(site, partial(_held, tree, name)) for name, site in sites.items()}
    observers = {name: one for name, one in starters.items() if isinstance(one, Observer)}
    _check(observers, examples)
    if observers and examples is not None:
        observe(tree, config, observers, examples)
        config, kept = config.after(observers)
        sites = {name: sites[name] for name in kept}
    found = {}
    for name, site in sites.items():
        method = config.method(spelled[name])
        found[name] = site, method, _params(tree, name, site, method, starters[name])
    return config, found


def _params(tree: Tree, name: str, site: Site, method: Method, starter: Starter | None) -> Params:
    base = partial(tree.dense, name)
    return method.init(site, base) if starter is None else starter.begin(site, method, base)


def _check(observers: Mapping[str, Observer], examples: Examples | None) -> None:
    if examples is not None and not observers:
        raise UsageError("examples are given, and this adapter starts without; leave them out")
    if observers and examples is None:
        start = next(iter(observers.values())).start
        raise UsageError(
            f"examples: none are given, and init_lora_weights {start!r} starts from what the model makes of some; "
            "give inject an iterable of batches, examples=..."
        )


def _held(tree: Tree, name: str, form: str, weight: Tensor) -> Tensor:
    """A weight as the format holds it, of a layer that holds its own plainly."""
    if is_quantized(tree.plain(name)):
        raise StateError(
            f"{printable(name)}: its weight is quantized, and the start is of what {form} would lose of it; load the "
            "model in 16 or 32 bits, or start with 'pissa'"
        )
    codec, settings = format_of(form, name)
    return codec.decode(codec.fresh(weight, settings), weight.dtype)
