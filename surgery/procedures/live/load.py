"""load: an adapter of PEFT's files laid over a live model, each tensor at its place."""

import warnings
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from math import prod

import torch
from torch import Tensor, nn

from surgery.adapters import out_proj
from surgery.adapters.completing import completed, drawn_notes
from surgery.adapters.peft import check_shapes
from surgery.codecs.plain import PLAIN_DTYPES
from surgery.core.adapter import Adapter
from surgery.core.names import Endings, in_base, nearest, owners, renaming
from surgery.core.sharded import is_sharded, whole
from surgery.errors import MatchError, printable
from surgery.hosts.holding import Awareness
from surgery.io.fingerprint import BASE_PRINT
from surgery.io.octets import sha256_of
from surgery.layers import Adapted, Replaced
from surgery.procedures.live.awareness import holdings
from surgery.procedures.live.fitting import Fitting, check_name, fit, refuse_copy
from surgery.procedures.live.own_weight import base_sha256
from surgery.procedures.live.room import with_room
from surgery.procedures.live.save import DEFAULT
from surgery.procedures.places.biases import given_biases
from surgery.procedures.places.dealt import with_dealt
from surgery.procedures.places.fused import fused
from surgery.procedures.places.model_tree import Tree
from surgery.procedures.places.parameters import assigned, module_of, targeted
from surgery.procedures.places.rows import FittedSite, refuse_missing, with_tied_rows
from surgery.procedures.places.stacking import stacked
from surgery.procedures.places.tied_copies import Saved, with_tied_copies
from surgery.procedures.places.tied_heads import agreeing_heads

_HASHED = 4  # weights of a model that are compared with those that an adapter was trained on


@dataclass(frozen=True)
class LayOptions:
    """How an adapter is held, and how it runs."""

    held: Awareness | None = None  # how weights will be held, of which it is aware
    room: int | None = None  # others of ranks up to it can take its place by `refill`
    weight: float = 1.0


def lay(
    root: nn.Module,
    adapter: Adapter,
    adapter_name: str = DEFAULT,
    trainable: bool = False,
    how: LayOptions | None = None,
) -> None:
    """Lay an adapter over the model; every tensor finds its place, or nothing changes."""
    how = how or LayOptions()
    check_name(root, adapter_name)
    if trainable:
        adapter.config.check_trained()
    for note in (*out_proj.notes(adapter), *drawn_notes(adapter)):
        warnings.warn(note, stacklevel=2)
    with stacked(root, adapter.config):
        tree = Tree(root)
        fitting = fitting_of(tree, adapter)
        if how.held is not None:
            fitting = replace(fitting, aware=holdings(tree.modules, adapter.config, fitting.sites, how.held))
        if how.room is not None:
            fitting = with_room(fitting, how.room, adapter)
        fit(tree, adapter_name, fitting if how.weight == 1 else fitting.weighted(how.weight), trainable)


def fitting_of(tree: Tree, adapter: Adapter) -> Fitting:
    """Where each tensor of an adapter goes in this model. InputError unless all have a place."""
    adapter = fused(tree, with_dealt(tree, adapter))
    given = {name: in_base(_module(tree, adapter, name)) for name in adapter.sites}
    given |= {name: name for name in sorted(adapter.targets)}
    renamed = renaming(list(dict.fromkeys(given.values())), tree.modules.keys())
    if not renamed:
        absent = next(name for name in given.values() if name not in tree.modules)
        close = ", ".join(printable(other) for other in nearest(absent, tree.modules))
        raise MatchError(
            f"{printable(adapter.where)}: {printable(absent)} is not in the model; nearest there: {close}; "
            "is this the adapter's base?"
        )
    names = {name: renamed[path] for name, path in given.items()}
    alone = {name: name for name in adapter.sites if tree.reads_itself(name)}
    alone |= assigned(
        adapter, lambda name, _: targeted(adapter, name, tree.held(renamed[name])) if name in renamed else ()
    )
    _check_copies(tree, adapter)
    _check_base(tree, adapter, names)
    sites = _sites_of(tree, adapter, names, alone)
    targets = {name: tree.first_name(names[name]) for name in sorted(adapter.targets)}
    saved = _saved(tree, adapter, targets)
    if targets:
        return Fitting(adapter.config.named(sorted({*targets.values()})), sites, saved)
    sites = with_tied_rows(tree, sites, saved)
    _check_ties(tree, adapter, sites, saved)
    refuse_missing(adapter.config, sites, adapter.where)
    biases = given_biases(tree, adapter, list(given.values()), [*sites], saved)
    return Fitting(adapter.config, sites, saved, biases=biases, heads=agreeing_heads(tree, adapter.config, sites))


def _sites_of(
    tree: Tree, adapter: Adapter, names: Mapping[str, str], alone: Mapping[str, str]
) -> dict[str, FittedSite]:
    """The adapter at each site, by the model's `names`; of those of `alone` that is a parameter, the rest are modules.

    ShapeError for tensors that do not fit; MatchError where two of the adapter's are one here, and differ.
    """
    there = {
        name: tree.parameter_site(f"{names[name]}.{alone[name].rpartition('.')[2]}")
        if name in alone
        else tree.site(tree.first_name(names[name]))
        for name in (*(name for name in adapter.sites if name not in alone), *alone)
    }
    at = {name: place for place, name in enumerate(tree.modules)}
    in_order = dict(sorted(there.items(), key=lambda item: at.get(item[1].name, -1)))  # a parameter is no module
    adapter, sites = completed(adapter, in_order, in_order=True), dict[str, FittedSite]()
    for name, site in there.items():
        params, first, method = adapter.sites[name], site.name, adapter.config.method(alone.get(name, name))
        check_shapes(name, params, method.tensors(site), adapter.where)
        method.check_values(params, site, adapter.where)
        method.check_run(site)
        if first in sites and not all(torch.equal(values, sites[first][2][role]) for role, values in params.items()):
            raise MatchError(
                f"{printable(adapter.where)}: {printable(name)} and another site are one module of this model, and "
                "their tensors differ; one adapter of each is wanted; was it renamed?"
            )
        sites[first] = site, method, params
    return sites


def _module(tree: Tree, adapter: Adapter, name: str) -> str:
    """The path of the module that a site is, or that holds it."""
    if tree.reads_itself(name):
        return name.rpartition(".")[0]
    return module_of(name) if adapter.config.parameters() else name


def _check_base(tree: Tree, adapter: Adapter, names: Mapping[str, str]) -> None:
    """MatchError if the adapter was trained on another base. A few weights tell two bases apart, so few are hashed.

    `names` are the model's, by the adapter's names of its sites.
    """
    paths = {in_base(module_of(name)): path for name, path in names.items()}
    told = [name for name in adapter.trained_on if name.rpartition(".")[0] in paths]
    for name in told[:: max(1, len(told) // _HASHED)]:
        path, _, own = name.rpartition(".")
        module, (info, digest) = tree.modules[paths[path]], adapter.trained_on[name]
        weight = tree.held(paths[path]).get(own)
        if weight is None or weight.is_meta or not weight.numel():
            continue
        plain = {weight.dtype, info.dtype} <= set(PLAIN_DTYPES)
        if plain and not is_sharded(weight) and weight.numel() != prod(info.shape):
            raise MatchError(
                f"{printable(adapter.where)}: it was trained on another base: {printable(name)} was "
                f"{list(info.shape)} there, and here {list(weight.shape)}; load that base"
            )
        if (weight.dtype, tuple(weight.shape)) != (info.dtype, info.shape):
            continue
        layer = tree.alone.get(f"{paths[path]}.{own}", module)
        found = base_sha256(layer) if isinstance(layer, Adapted) else sha256_of(weight)
        if found != digest:
            raise MatchError(
                f"{printable(adapter.where)}: it was trained on another base: {printable(name)} had sha256 "
                f"{printable(digest)} there, and here {found}; load that base, or remove the adapter's {BASE_PRINT}"
            )


def _check_copies(tree: Tree, adapter: Adapter) -> None:
    for name, values in adapter.copies.items():
        path, _, own = name.rpartition(".")
        weight = tree.held(path).get(own) if path in tree.modules else None
        if (
            weight is None
            or weight.shape != values.shape
            or not torch.equal(whole(weight).cpu(), values.to(weight.dtype))
        ):
            raise MatchError(
                f"{printable(adapter.where)}: its copy of {printable(name)} is not equal to the model's; "
                "it was trained or resized; name it in modules_to_save"
            )


def _check_ties(tree: Tree, adapter: Adapter, sites: Collection[str], saved: Saved) -> None:
    """MatchError unless tied copies are all in the file."""
    for name in with_tied_copies(tree, adapter.config, sites, saved):
        if name not in saved:
            raise MatchError(
                f"{printable(adapter.where)}: ensure_weight_tying, and {printable(name)}, whose weight is tied to "
                "one of modules_to_save, is not in it; save it again"
            )


def _saved(tree: Tree, adapter: Adapter, targets: Mapping[str, str]) -> dict[str, Mapping[str, Tensor] | None]:
    """The tensors of `modules_to_save`, and of what is targeted, by module, each module whole.

    `targets` are the model's paths by the adapter's.
    """
    grouped: dict[str, dict[str, Tensor]] = {}
    roots = sorted((name for name in tree.modules), key=len)
    ends = Endings(adapter.config.modules_to_save or ())
    modules = [name for name in roots if ends.end(name)]
    for name, values in adapter.saved.items():
        if name in adapter.biases:
            continue
        target = next((module for module in owners(name) if module in targets), None)
        if target is not None:
            grouped.setdefault(targets[target], {})[name.removeprefix(target + ".")] = values
            continue
        owner = next((module for module in modules if name.startswith(module + ".")), None)
        if owner is None and adapter.config.ties() and name.rpartition(".")[0] in tree.modules:
            owner = name.rpartition(".")[0]  # tied to one of them
        if owner is None:
            raise MatchError(f"{printable(adapter.where)}: {printable(name)} of modules_to_save is not in the model")
        grouped.setdefault(tree.first_name(owner), {})[name.removeprefix(owner + ".")] = values
    for owner, given in grouped.items():
        module = tree.modules[owner]
        field = "target_modules" if owner in targets.values() else "modules_to_save"
        refuse_copy(module, owner, field)
        own = module.original if isinstance(module, Replaced) else module
        found, wanted = map(_told, (given, own.state_dict()))
        if found != wanted:
            raise MatchError(
                f"{printable(adapter.where)}: {printable(owner)} of {field} holds {found}, and the model's "
                f"{wanted}; the same tensors are wanted; is this the adapter's base?"
            )
    return dict(grouped)


def _told(tensors: Mapping[str, Tensor]) -> str:
    return ", ".join(f"{printable(name)} {list(tensors[name].shape)}" for name in sorted(tensors)) or "nothing"
