"""save and load: a live model's adapters to PEFT's files, and from them."""

from collections.abc import Iterable, Mapping
from dataclasses import fields, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from surgery.adapters.peft import CONFIG, PREFIX, TENSORS, adapter_bytes, check_shapes, read_adapter
from surgery.core.adapter import Adapter
from surgery.core.config import AdapterConfig
from surgery.core.method import Method, Params, Spec
from surgery.core.names import in_base, nearest, renaming
from surgery.core.site import Site
from surgery.errors import MatchError, StateError, printable
from surgery.hosts.tree import State, adapted_layers, injected, live_path, replaced_modules, spelled
from surgery.io.durable import write_file
from surgery.io.fingerprint import BASE_PRINT, Hashed, base_print_bytes
from surgery.io.octets import sha256_of
from surgery.io.strict_json import json_bytes
from surgery.layers import Adapted
from surgery.procedures.fused import fused
from surgery.procedures.inject import Fitting, check_name, fit
from surgery.procedures.merge import base_sha256
from surgery.procedures.model_tree import Tree
from surgery.procedures.parameters import assigned, module_of, targeted

DEFAULT = "default"
_HASHED = 4  # weights of a model that are compared with those that an adapter was trained on


def save(root: nn.Module, folder: Path, adapters: Iterable[str] | None = None) -> None:
    """Write adapters, all if None: "default" into `folder` itself, each other into a sub-folder of its name.

    StateError if the model has none, or not that one.
    """
    state = injected(root)
    for adapter in state.configs if adapters is None else adapters:
        known(state, adapter)
        write(root, folder if adapter == DEFAULT else folder / adapter, adapter)


def write(
    root: nn.Module,
    folder: Path,
    adapter: str,
    state_dict: Mapping[str, Tensor] | None = None,
    prefix: str = PREFIX,
) -> None:
    """One adapter's files into `folder`, as `tensors_of` gives its tensors, whose names begin with `prefix` there."""
    config, tensors = _written(root, adapter, state_dict)
    config = _resolved(root, config, adapter)
    write_file(folder / TENSORS, adapter_bytes(tensors, prefix))
    write_file(folder / BASE_PRINT, base_print_bytes(_base_print(root, adapter)))
    write_file(folder / CONFIG, json_bytes(config.to_json()))


def active_folders(root: nn.Module, folder: Path) -> dict[str, Path]:
    """Where each active adapter is written: one into `folder` itself, several into sub-folders of their names."""
    active = injected(root).active
    if not active:
        raise StateError("no adapter is active, so that none is saved or loaded; set_adapter first")
    return {active[0]: folder} if len(active) == 1 else {name: folder / name for name in active}


def load(root: nn.Module, path: Path, adapter_name: str = DEFAULT, trainable: bool = False) -> None:
    """Lay the adapter at `path` over the model; every tensor finds its place, or nothing changes."""
    check_name(root, adapter_name)
    lay(root, read_adapter(path), adapter_name, trainable)


def lay(root: nn.Module, adapter: Adapter, adapter_name: str = DEFAULT, trainable: bool = False) -> None:
    """Lay an adapter that has been read over the model, as `load` does."""
    check_name(root, adapter_name)
    tree = Tree(root)
    fit(tree, adapter_name, fitting_of(tree, adapter), trainable)


def fitting_of(tree: Tree, adapter: Adapter) -> Fitting:
    """Where each tensor of an adapter goes in this model. InputError unless all have a place."""
    adapter = fused(tree, adapter)
    given = {name: in_base(_module(tree, adapter, name)) for name in adapter.sites}
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
    sites: dict[str, tuple[Site, Method, Params]] = {}
    for name in (*(name for name in adapter.sites if name not in alone), *alone):
        params, path = adapter.sites[name], names[name]
        if name in alone:
            site = tree.parameter_site(f"{path}.{alone[name].rpartition('.')[2]}")
        else:
            site = tree.site(tree.first_name(path))
        first, method = site.name, adapter.config.method(alone.get(name, name))
        wanted = {role: spec.shape for role, spec in method.tensors(site).items()}
        check_shapes(name, params, wanted, adapter.where)
        if first in sites and not all(torch.equal(values, sites[first][2][role]) for role, values in params.items()):
            raise MatchError(
                f"{printable(adapter.where)}: {printable(name)} and another site are one module of this model, and "
                "their tensors differ; one adapter of each is wanted; was it renamed?"
            )
        sites[first] = site, method, params
    return Fitting(adapter.config, sites, _saved(tree, adapter))


def _module(tree: Tree, adapter: Adapter, name: str) -> str:
    """The path of the module that a site is, or that holds it."""
    if tree.reads_itself(name):
        return name.rpartition(".")[0]
    return module_of(name) if adapter.config.parameters() else name


def known(state: State, adapter: str) -> None:
    """StateError if the model has no adapter of that name."""
    if adapter not in state.configs:
        there = ", ".join(state.configs)
        raise StateError(f"adapter {printable(adapter)!r} is not in the model; there are: {there}")


def tensors_of(root: nn.Module, adapter: str, state_dict: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
    """An adapter's tensors, named as PEFT ends them; out of `state_dict`, named as in the model, if it is given."""
    return _written(root, adapter, state_dict)[1]


def _written(
    root: nn.Module, adapter: str, state_dict: Mapping[str, Tensor] | None
) -> tuple[AdapterConfig, dict[str, Tensor]]:
    """Config and tensors, as files hold them."""
    specs: dict[str, Mapping[str, Spec]] = {}
    sites: dict[str, Params] = {}
    layers = adapted_layers(root)
    for name, layer in layers.items():
        if adapter in layer.fitted:
            one = layer.fitted[adapter]
            there, held = spelled(layers, name, adapter), one.method.tensors(layer.site)
            specs[there] = held
            sites[there] = (
                one.params if state_dict is None else _picked(state_dict, live_path(layers, name), adapter, held)
            )
    config, kept = injected(root).configs[adapter].written(sites)
    found = {f"{name}.{spec.spelling}": kept[name][role] for name in kept for role, spec in specs[name].items()}
    return config, found | _replacements(root, adapter, state_dict)


def _picked(state_dict: Mapping[str, Tensor], path: str, adapter: str, specs: Mapping[str, Spec]) -> Params:
    """The tensors of a layer, by role, out of a model's state_dict."""
    picked = {}
    for role, spec in specs.items():
        slot, leaf = spec.held
        picked[role] = _held(state_dict, f"{path}.{slot}.{adapter}.{leaf}".rstrip("."))
    return picked


def _replacements(root: nn.Module, adapter: str, state_dict: Mapping[str, Tensor] | None) -> dict[str, Tensor]:
    """The tensors of `modules_to_save`."""
    found = {}
    for name, module in replaced_modules(root).items():
        if adapter in module.modules_to_save:
            for key, values in module.modules_to_save[adapter].state_dict().items():
                live = f"{name}.modules_to_save.{adapter}.{key}"
                found[f"{name}.{key}"] = values if state_dict is None else _held(state_dict, live)
    return found


def _held(state_dict: Mapping[str, Tensor], name: str) -> Tensor:
    if name not in state_dict:
        raise MatchError(f"state_dict: it has no {printable(name)}; a state_dict of this model is wanted")
    return state_dict[name]


def _base_print(root: nn.Module, adapter: str) -> Hashed:
    """The base's weights under the adapter, each with its sha256."""
    layers = {name: layer for name, layer in adapted_layers(root).items() if adapter in layer.fitted}
    infos = {layer.site.weight.name: layer.site.weight for layer in layers.values()}
    hashes = map(base_sha256, layers.values())
    return {
        name: (info._replace(name=name), digest) for (name, info), digest in zip(infos.items(), hashes, strict=True)
    }


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
        if weight is None or weight.is_meta or (weight.dtype, tuple(weight.shape)) != (info.dtype, info.shape):
            continue
        layer = tree.alone.get(f"{paths[path]}.{own}", module)
        found = base_sha256(layer) if isinstance(layer, Adapted) else sha256_of(weight)
        if found != digest:
            raise MatchError(
                f"{printable(adapter.where)}: it was trained on another base: {printable(name)} had sha256 "
                f"{printable(digest)} there, and here {found}; load that base, or remove the adapter's {BASE_PRINT}"
            )


def _resolved(root: nn.Module, config: AdapterConfig, adapter: str) -> AdapterConfig:
    """The config with the paths it stands for, so that a reader needs no matching."""
    layers = {name: layer for name, layer in adapted_layers(root).items() if adapter in layer.fitted}
    alone = [name for name, layer in layers.items() if layer.parameter is not None]
    resolved = replace(
        config.named(sorted(name for name in layers if spelled(layers, name, adapter) == name)).with_parameters(alone),
        inference_mode=True,
        base_model_name_or_path=config.base_model_name_or_path or getattr(root, "name_or_path", None) or None,
    )
    if any(field.name == "fan_in_fan_out" for field in fields(config)):
        transposed = any(layer.op.name == "conv1d" for layer in layers.values())
        return replace(resolved, **{"fan_in_fan_out": transposed})  # type: ignore[arg-type]  # known only here
    return resolved


def _check_copies(tree: Tree, adapter: Adapter) -> None:
    for name, values in adapter.copies.items():
        module = tree.modules.get(name.removesuffix(".weight"))
        base = module.base_layer if isinstance(module, Adapted) else module
        weight = None if base is None else base._parameters.get("weight")
        if weight is None or weight.shape != values.shape or not torch.equal(weight.cpu(), values.to(weight.dtype)):
            raise MatchError(
                f"{printable(adapter.where)}: its copy of {printable(name)} is not equal to the model's; "
                "it was trained or resized; name it in modules_to_save"
            )


def _saved(tree: Tree, adapter: Adapter) -> dict[str, Mapping[str, Tensor]]:
    """The tensors of `modules_to_save` by module, each module whole."""
    grouped: dict[str, dict[str, Tensor]] = {}
    roots = sorted((name for name in tree.modules), key=len)
    entries = frozenset(adapter.config.modules_to_save or ())
    modules = [name for name in roots if name.rpartition(".")[2] in entries or name in entries]
    for name, values in adapter.saved.items():
        owner = next((module for module in modules if name.startswith(module + ".")), None)
        if owner is None:
            raise MatchError(f"{printable(adapter.where)}: {printable(name)} of modules_to_save is not in the model")
        grouped.setdefault(tree.first_name(owner), {})[name.removeprefix(owner + ".")] = values
    for owner, given in grouped.items():
        module = tree.modules[owner]
        wanted = {
            key: tuple(values.shape) for key, values in getattr(module, "original_module", module).state_dict().items()
        }
        if {key: tuple(values.shape) for key, values in given.items()} != wanted:
            raise MatchError(
                f"{printable(adapter.where)}: {printable(owner)} of modules_to_save holds {sorted(given)}; "
                f"the model's holds {sorted(wanted)}, and shapes must be equal too"
            )
    return dict(grouped)
