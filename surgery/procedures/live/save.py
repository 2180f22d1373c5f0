"""save: a live model's adapters to PEFT's files."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path

from torch import Tensor, nn

from surgery.adapters import out_proj
from surgery.adapters.peft import CONFIG, TENSORS, adapter_bytes, config_bytes
from surgery.adapters.sorting import PREFIX
from surgery.core.config import AdapterConfig
from surgery.core.method import Params
from surgery.core.names import suffix_hits
from surgery.core.sharded import rest, whole, written_by_one
from surgery.core.site import TensorInfo
from surgery.core.spec import Spec
from surgery.core.turned import tied
from surgery.errors import MatchError, StateError, printable
from surgery.hosts.tree import adapted_layers, injected, live_path, places, replaced_modules, spelled
from surgery.io.durable import remove_other, write_file
from surgery.io.fingerprint import BASE_PRINT, Hashed, base_print_bytes
from surgery.io.octets import sha256_of
from surgery.layers import Adapted
from surgery.layers.running import Tied
from surgery.methods.lora_config import LoraConfig
from surgery.procedures.live.own_weight import base_sha256, own_weight
from surgery.procedures.places.biases import written_biases
from surgery.procedures.places.rows import repeats

DEFAULT = "default"


def save(root: nn.Module, folder: Path, adapters: Iterable[str] | None = None) -> None:
    """Write adapters, all if None: "default" into `folder` itself, each other into a sub-folder of its name.

    StateError if the model has none, or not that one.
    """
    state = injected(root)
    for adapter in state.configs if adapters is None else adapters:
        state.require(adapter)
        write(root, folder if adapter == DEFAULT else folder / adapter, adapter)


def write(
    root: nn.Module,
    folder: Path,
    adapter: str,
    state_dict: Mapping[str, Tensor] | None = None,
    prefix: str = PREFIX,
) -> None:
    """One adapter's files into `folder`, as `tensors_of` gives its tensors, whose names begin with `prefix` there.

    Of a model in shares all processes call it and the first writes; elsewhere a `state_dict` may be empty.
    """
    rest(root)
    _refuse_meta(root, adapter)
    with written_by_one(root) as writes:
        base = base_print_bytes(_base_print(root, adapter))
        if not writes and state_dict is not None:
            return
        config, tensors = _written(root, adapter, state_dict)
        held = adapter_bytes(tensors, prefix, config.shared)
        if writes:
            told = config_bytes(_resolved(root, config, adapter))
            remove_other(folder / CONFIG, told)  # cut short from here on it is no adapter, and none of old settings
            write_file(folder / TENSORS, held)
            write_file(folder / BASE_PRINT, base)
            write_file(folder / CONFIG, told)


def _refuse_meta(root: nn.Module, adapter: str) -> None:
    """StateError where there are no values that could be written."""
    held = {name: own_weight(layer) for name, layer in _layers(root, adapter).items()}
    copies = {name: one.copies[adapter] for name, one in replaced_modules(root).items() if adapter in one.copies}
    held |= {f"{name}.{key}": values for name, one in copies.items() for key, values in one.state_dict().items()}
    for name, values in held.items():
        if values.is_meta:
            raise StateError(
                f"{printable(name)}: it is on the meta device; give the model its weights before it is saved"
            )


def active_folders(root: nn.Module, folder: Path) -> dict[str, Path]:
    """Where each active adapter is written: one into `folder` itself, several into sub-folders of their names."""
    active = injected(root).active
    if not active:
        raise StateError("no adapter is active, so that none is saved or loaded; set_adapter first")
    return {active[0]: folder} if len(active) == 1 else {name: folder / name for name in active}


def tensors_of(root: nn.Module, adapter: str, state_dict: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
    """An adapter's tensors, named as PEFT ends them; out of `state_dict`, named as in the model, if it is given."""
    return _written(root, adapter, state_dict)[1]


def _written(
    root: nn.Module, adapter: str, state_dict: Mapping[str, Tensor] | None
) -> tuple[AdapterConfig, dict[str, Tensor]]:
    """Config and tensors, as files hold them."""
    own = injected(root).configs[adapter]
    specs: dict[str, Mapping[str, Spec]] = {}
    sites: dict[str, Params] = {}
    shared: dict[str, Tensor] = {}
    layers = adapted_layers(root)
    for name, layer in (_every(root, adapter) if own.repeats_rows else _layers(root, adapter)).items():
        one = layer.fitted[adapter]
        there = spelled(layers, name, adapter)
        specs[there] = one.method.tensors(layer.site)
        params = one.params if state_dict is None else _picked(state_dict, layers, name, adapter)
        if own.keeps_shared() and not shared:
            shared = own.spelled_shared({role: whole(params[role]) for role in own.shared.values()})
        sites[there] = {role: whole(params[role]) for role in params if not specs[there][role].shared}
    config, kept = own.written(sites)
    endings = {one.role: ending for ending, one in config.endings().items()}  # of what takes the place of others
    found = {
        f"{name}.{specs[name][role].spelling if role in specs[name] else endings[role]}": out_proj.written(
            name, role, values
        )
        for name in kept
        for role, values in kept[name].items()
    }
    repeated = {f"{name}.{spelling}": shared[spelling] for name in specs if own.repeats_shared for spelling in shared}
    return config, found | shared | repeated | _replacements(root, adapter, state_dict)


def _picked(state_dict: Mapping[str, Tensor], layers: Mapping[str, Adapted], name: str, adapter: str) -> Params:
    """The tensors of a layer, by role, out of a model's state_dict."""
    layer, path, picked = layers[name], live_path(layers, name), {}
    one = layer.fitted[adapter]
    if isinstance(one, Tied):
        return tied(one.op, _picked(state_dict, layers, one.of, adapter))
    for role, spec in one.method.tensors(layer.site).items():
        slot, leaf = spec.held
        picked[role] = _held(state_dict, f"{path}.{slot}.{adapter}.{leaf}".rstrip("."))
    return one.own(picked)


def _replacements(root: nn.Module, adapter: str, state_dict: Mapping[str, Tensor] | None) -> dict[str, Tensor]:
    """The tensors of `modules_to_save`, and the biases that it trains."""
    found = {}
    config = injected(root).configs[adapter]
    targets = _copied(config)
    for name, module in replaced_modules(root).items():
        if adapter in module.copies:
            for key, values in module.copies[adapter].state_dict().items():
                live = f"{name}.{module.spelled.copies}.{adapter}.{key}"
                infix = f"{config.copied}.{f'{adapter}.' if '.' in key else ''}" if name in targets else ""
                found[f"{name}.{infix}{key}"] = values if state_dict is None else _held(state_dict, live)
    for one in written_biases(root, injected(root), adapter):
        found[one.spelling] = one.values if state_dict is None else _held(state_dict, one.held(state_dict))
    return found


def _copied(config: AdapterConfig) -> frozenset[str]:
    """The modules that it targets and trains whole, by the model's paths."""
    return frozenset(config.target_modules or ()) if config.copied else frozenset()


def _held(state_dict: Mapping[str, Tensor], name: str) -> Tensor:
    if name not in state_dict:
        raise MatchError(f"state_dict: it has no {printable(name)}; a state_dict of this model is wanted")
    return state_dict[name]


def _base_print(root: nn.Module, adapter: str) -> Hashed:
    """The base's weights under the adapter, each with its sha256; one that two layers hold, once."""
    found = _layers(root, adapter).items()
    layers = {name: layer for name, layer in found if not isinstance(layer.fitted[adapter], Tied)}
    infos = {layer.site.weight.name: _held_as(layer) for layer in layers.values()}
    hashes = map(base_sha256, layers.values())
    return {
        name: (info._replace(name=name), digest) for (name, info), digest in zip(infos.items(), hashes, strict=True)
    } | _targets_print(root, injected(root).configs[adapter])


def _targets_print(root: nn.Module, config: AdapterConfig) -> dict[str, tuple[TensorInfo, str]]:
    """The same of the modules that it trains copies of."""
    holders = replaced_modules(root)
    held = {
        f"{name}.{key}": values
        for name in sorted(_copied(config))
        for key, values in holders[name].original.named_parameters()
    }
    return {
        name: (TensorInfo(name, values.dtype, tuple(values.shape)), sha256_of(whole(values)))
        for name, values in held.items()
    }


def _layers(root: nn.Module, adapter: str) -> dict[str, Adapted]:
    """Those that it lies over, without what only shares the rows of another."""
    layers = _every(root, adapter)
    shared = repeats(layers, adapter)
    return {name: layer for name, layer in layers.items() if name not in shared}


def _every(root: nn.Module, adapter: str) -> dict[str, Adapted]:
    return {name: layer for name, layer in adapted_layers(root).items() if adapter in layer.fitted}


def _held_as(layer: Adapted) -> TensorInfo:
    """The base's parameter as a file would list it: of a quantized weight, its codes."""
    held = own_weight(layer)
    return layer.site.weight._replace(dtype=held.dtype, shape=tuple(held.shape))


def _resolved(root: nn.Module, config: AdapterConfig, adapter: str) -> AdapterConfig:
    """The config with the paths it stands for, so that a reader needs no matching."""
    layers = _layers(root, adapter)
    alone = [name for name, layer in layers.items() if layer.parameter is not None]
    names = sorted([*_copied(config), *(name for name in layers if spelled(layers, name, adapter) == name)])
    resolved = replace(
        config.named(names).with_parameters(alone),
        exclude_modules=_ended(root, names) or None,
        modules_to_save=config.modules_to_save if config.ties() else _replaced(root, adapter),
        inference_mode=True,
        base_model_name_or_path=config.base_model_name_or_path or getattr(root, "name_or_path", None) or None,
    )
    if any(layer.op.name == "attention" and f"{name}.out_proj" not in layers for name, layer in layers.items()):
        resolved = _beginning_at_zero(resolved)
    if any(field.name == "fan_in_fan_out" for field in fields(config)):
        transposed = any(layer.op.name == "conv1d" for layer in layers.values())
        return replace(resolved, **{"fan_in_fan_out": transposed})  # type: ignore[arg-type]  # known only here
    return resolved


def _replaced(root: nn.Module, adapter: str) -> list[str] | None:
    """Whole names: PEFT takes every module whose name ends in an entry, from whatever letter on."""
    holders, targets = replaced_modules(root), _copied(injected(root).configs[adapter])
    return [name for name, one in holders.items() if adapter in one.copies and name not in targets] or None


def _beginning_at_zero(config: AdapterConfig) -> AdapterConfig:
    """PEFT lays over each attention layer's out_proj what the file may lack: it must begin without effect."""
    assert isinstance(config, LoraConfig)
    return replace(config, init_lora_weights=True)


def _ended(root: nn.Module, names: Sequence[str]) -> list[str]:
    """Other modules whose names end in one of these, which PEFT would adapt too."""
    chosen = frozenset(names)
    others = dict.fromkeys(place.name for place in places(root) if place.name not in chosen)
    return [name for name in others if suffix_hits(chosen, name)]
