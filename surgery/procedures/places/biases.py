"""Biases of the base that an adapter trains: PEFT's `bias`, "all" or such as "lora_only"."""

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from surgery.core.adapter import Adapter
from surgery.core.config import AdapterConfig
from surgery.core.names import Prefix, prefix_between
from surgery.errors import MatchError, ShapeError, StateError, printable
from surgery.hosts.tree import State, adapted_layers, spelled
from surgery.layers import Adapted, Replaced
from surgery.layers.trained_bias import TRAINED, own_bias, run_bias, trained_bias
from surgery.procedures.places.model_tree import Tree

Biases = Mapping[str, Tensor | None]  # by module: what it starts from; None: the module's own


def trained_modules(tree: Tree, config: AdapterConfig, sites: Collection[str], saved: Collection[str]) -> list[str]:
    """The modules whose biases `config` trains: of its sites, or all; those of modules_to_save are whole copies.

    MatchError for one that cannot be.
    """
    if config.biases() == "none":
        return []
    if config.biases().endswith("_only"):  # PEFT has a word for each method
        return [name for name in sites if _has_bias(tree, name)]
    if tree.root._parameters.get("bias") is not None:
        raise MatchError("bias is 'all', and the model itself holds one, outside any module; wrap it in a module")
    copied = {id(one) for name in saved for one in tree.modules[name].modules()}
    return [
        name
        for name, module in tree.modules.items()
        if tree.first_name(name) == name and id(module) not in copied and _has_bias(tree, name)
    ]


def given_biases(
    tree: Tree, adapter: Adapter, given: Sequence[str], sites: Collection[str], saved: Collection[str]
) -> Biases:
    """Those of a file by the model's modules. MatchError for one that has no place, or a place without one.

    `given` are the paths of its sites as the file has them.
    """
    if adapter.config.biases() == "none":
        return {}
    where, found = printable(adapter.where), dict[str, Tensor]()
    prefix = prefix_between(given, tree.modules) or Prefix()
    for name in sorted(adapter.biases):
        path, values = prefix.of(name.rpartition(".")[0]), adapter.saved[name]
        if path not in tree.modules or not _has_bias(tree, path):
            raise MatchError(f"{where}: {printable(name)} is not in the model; is this the adapter's base?")
        first, there = tree.first_name(path), own_bias(tree.plain(path))
        if there is not None and there.shape != values.shape:
            raise ShapeError(
                f"{where}: {printable(name)} is {list(values.shape)}, the model's is {list(there.shape)}; they must be "
                "equal; is this the adapter's base?"
            )
        if first in found and not torch.equal(found[first], values):
            raise MatchError(f"{where}: {printable(name)} is another module's too, and the two differ; one is wanted")
        found[first] = values
    for name in trained_modules(tree, adapter.config, sites, saved):
        if name not in found:
            raise MatchError(
                f"{where}: bias is {adapter.config.biases()!r}, and {printable(name)}.bias is not in it; "
                "whoever wrote the file left it out; save it again, or set bias to 'none' in its config"
            )
    return found


def refuse_clash(tree: Tree, state: State | None, biases: Biases, saved: Collection[str]) -> None:
    """StateError where two adapters would train biases, as in PEFT, or one of them whole copies of such modules."""
    there = {} if state is None else state.biases
    if biases and there:
        raise StateError(
            f"adapter {printable(next(iter(there)))!r} trains biases of the base, which one adapter of a model can, as "
            "in PEFT; delete that one first, or set bias to 'none'"
        )
    trained = {id(module) for modules in there.values() for module in modules.values()}
    for name in saved:
        if any(id(one) in trained for one in tree.modules[name].modules()):
            raise StateError(
                f"{printable(name)}: modules_to_save names it, and another adapter trains its bias; leave it out"
            )
    for name, module in tree.modules.items() if biases else ():
        inside = module.original.modules() if isinstance(module, Replaced) and name not in saved else ()
        if any(own_bias(one) is not None for one in inside):
            raise StateError(
                f"{printable(name)}: another adapter replaces it (modules_to_save), so that its bias cannot be "
                "trained; set bias to 'none', or train those of adapted modules only"
            )


def lay_biases(tree: Tree, biases: Biases, trainable: bool) -> dict[str, nn.Module]:
    """Hold them beside the modules' own; one that two modules share stays one. Returns the modules."""
    made: dict[int, nn.Parameter] = {}
    modules = {name: tree.plain(name) for name in biases}
    for name, module in modules.items():
        own = own_bias(module)
        assert own is not None
        if id(own) not in made:
            given = biases[name]
            values = (own if given is None else given).detach().to(own.device, own.dtype, copy=True)
            made[id(own)] = nn.Parameter(values, requires_grad=trainable)
        module._parameters[TRAINED] = made[id(own)]
    return modules


def run_biases(state: State, adapters: Collection[str], enabled: bool) -> None:
    """Those of `adapters` run from now on, if `enabled`; else the modules' own."""
    for adapter, modules in state.biases.items():
        for module in modules.values():
            run_bias(module, trained=enabled and adapter in adapters)


class Written(NamedTuple):
    """A trained bias: how PEFT spells it, the module's path in the model as it is, and its values."""

    spelling: str
    path: str
    values: Tensor

    def held(self, state_dict: Mapping[str, Tensor]) -> str:
        """Its name in a state_dict of the model, whichever bias ran when that was taken."""
        beside = f"{self.path}.{TRAINED}"
        return beside if beside in state_dict else f"{self.path}.bias"


def written_biases(root: nn.Module, state: State, adapter: str) -> Iterator[Written]:
    """All that an adapter trains."""
    modules = state.biases.get(adapter, {})
    if not modules:
        return
    layers, live = adapted_layers(root), {id(module): name for name, module in root.named_modules()}
    for name, module in modules.items():
        adapted = name in layers and adapter in layers[name].fitted
        path = f"{spelled(layers, name, adapter)}.base_layer" if adapted else name
        yield Written(f"{path}.bias", live[id(module)], trained_bias(module))


def keep_biases(modules: Iterable[nn.Module]) -> None:
    """What runs becomes the modules' own."""
    with torch.no_grad():
        for module in modules:
            own, running = own_bias(module), module._parameters["bias"]
            if own is not None and running is not None and own is not running:
                own.copy_(running)


def _has_bias(tree: Tree, name: str) -> bool:
    module = tree.plain(name)
    return not isinstance(module, Adapted | Replaced) and own_bias(module) is not None
