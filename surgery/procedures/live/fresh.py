"""Fresh: the tensors that a new adapter starts with, of the base alone or of examples run through it."""

from collections.abc import Collection, Mapping, Sequence
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
from surgery.procedures.places.rows import FittedSite

Starters = dict[str, Starter | None]
MOST_BYTES = 4 << 30  # of what is gathered at once, of layers that need not be seen together


def fresh_sites(
    tree: Tree, config: AdapterConfig, spelled: Mapping[str, str], examples: Examples | None
) -> tuple[AdapterConfig, dict[str, FittedSite]]:
    """The adapter at each module, by name and as PEFT spells it; and its config, with the ranks that it was given.

    UsageError where examples are missing, or given and not needed, or run once and are needed again.
    """
    sites = {name: tree.site(name) for name in spelled}
    starters = {name: config.starter(site, partial(_held, tree, name)) for name, site in sites.items()}
    rounds = _rounds(starters)
    _check([one for one in starters.values() if isinstance(one, Observer)], len(rounds), examples)
    found = {}
    for names in rounds:
        now: Starters = {name: starters.pop(name) for name in names}  # what they have gathered goes with them
        config, kept = (config, names) if examples is None else _seen(tree, config, now, examples)
        for name in kept:
            method = config.method(spelled[name])
            found[name] = sites[name], method, _params(tree, name, sites[name], method, now.pop(name))
    return config, found


def _rounds(starters: Mapping[str, Starter | None]) -> list[list[str]]:
    """The layers, as many at a time as their observers may gather of."""
    rounds: list[list[str]] = [[]]
    held = 0
    for name, one in starters.items():
        size = one.nbytes if isinstance(one, Observer) and not one.until_settled else 0
        if rounds[-1] and held + size > MOST_BYTES:
            rounds.append([])
            held = 0
        rounds[-1].append(name)
        held += size
    return rounds


def _seen(
    tree: Tree, config: AdapterConfig, starters: Starters, examples: Examples
) -> tuple[AdapterConfig, Collection[str]]:
    """The config, and the layers that remain, after the examples have run."""
    observers = {name: one for name, one in starters.items() if isinstance(one, Observer)}
    observe(tree, config, observers, examples)
    return config.after(observers)


def _params(tree: Tree, name: str, site: Site, method: Method, starter: Starter | None) -> Params:
    base = partial(tree.dense, name)
    return method.init(site, base) if starter is None else starter.begin(site, method, base)


def _check(observers: Sequence[Observer], rounds: int, examples: Examples | None) -> None:
    if examples is None and observers:
        raise UsageError(
            f"examples: none are given, and init_lora_weights {observers[0].start!r} starts from what the model makes "
            "of some; give inject an iterable of batches, examples=..."
        )
    if examples is None:
        return
    if not observers:
        raise UsageError("examples are given, and this adapter starts without; leave them out")
    if examples.loss is not None and observers[0].sees != "gradients":
        raise UsageError(
            f"loss is given, and init_lora_weights {observers[0].start!r} starts without gradients; leave it out"
        )
    if rounds > 1 and examples.runs_once:
        raise UsageError(
            f"examples: an iterator runs once, and {rounds} rounds are needed, for what is gathered of all layers is "
            f"more than {MOST_BYTES >> 30} GiB; give a list or a DataLoader"
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
