"""Adapters with `target_parameters`, each of whose sites is called as the module or the parameter that it is for.

Files call them by the modules that hold them, as only a model tells; here names and the modules' known order do.
"""

import re
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import replace
from typing import NamedTuple

from surgery.core.adapter import Adapter, Weighted, shape_of
from surgery.core.name_map import USUAL
from surgery.core.names import suffix_hits
from surgery.core.select import ALL_LINEAR, select
from surgery.errors import InputError, ShapeError, printable
from surgery.io.fingerprint import BASE_PRINT
from surgery.methods.lora import Lora
from surgery.procedures.places.parameters import ORDER, assigned, in_order


class ByParameter(NamedTuple):
    """Adapters whose sites are called so, and those of the names that are parameters."""

    given: Sequence[Weighted]
    parameters: frozenset[str]
    notes: tuple[str, ...]  # on those of which no file tells whether they are stacks


def by_parameter(given: Sequence[Weighted]) -> ByParameter:
    """InputError where names do not tell what a site is, or where adapters are over a module and what lies in it."""
    named = [(one, assigned(one.adapter, _Held(one.adapter))) for one in given]
    parameters = frozenset(name for _, found in named for name in found.values())
    renamed = [one._replace(adapter=_renamed(one.adapter, found)) for one, found in named]
    for one in renamed:
        _refuse_nested(one.adapter, parameters)
    return ByParameter(renamed, parameters, tuple(note for one in renamed for note in _stacks(one.adapter, parameters)))


class _Held:
    """The targeted parameters of a module that has sites, in the module's order; none for what is adapted whole."""

    def __init__(self, adapter: Adapter) -> None:
        self.adapter, self.config = adapter, adapter.config
        self.entries = [entry.rpartition(".") for entry in self.config.parameters()]

    def __call__(self, module: str, names: Sequence[str]) -> Sequence[str]:
        own = {last for owner, _, last in self.entries if not owner or suffix_hits((owner,), module)}
        return () if not own or (len(names) == 1 and self._is_whole(module)) else in_order(module, sorted(own))

    def _is_whole(self, module: str) -> bool:
        targets = self.config.target_modules
        if isinstance(targets, str) and targets.lower() == ALL_LINEAR:
            method = self.config.method(module)
            return isinstance(method, Lora) and shape_of(self.adapter.sites[module], "A")[0] == method.r
        return bool(targets) and bool(select(self.config, [module], tuple))


def _renamed(adapter: Adapter, found: dict[str, str]) -> Adapter:
    return replace(adapter, sites={found.get(name, name): params for name, params in adapter.sites.items()})


def _refuse_nested(adapter: Adapter, parameters: Collection[str]) -> None:
    modules = {name.rpartition(".")[0] for name in parameters}
    for name in _modules(adapter.sites, parameters):
        part = USUAL.part(USUAL.rename(f"{name}.weight"))
        if name in modules or (part is not None and part.whole in parameters):
            raise InputError(
                f"{printable(adapter.where)}: {printable(name)} is adapted, and so are parameters of it, "
                "or the stack that it is a part of; one of the two is wanted; load each into the model, and save it"
            )


def _stacks(adapter: Adapter, parameters: frozenset[str]) -> Iterator[str]:
    """What is taken for a stack by nothing but a rank. ShapeError where other layers have it as another."""
    first: dict[str, tuple[str, int]] = {}  # by the name without its numbers
    for name in sorted(parameters & adapter.sites.keys() - adapter.trained_on.keys()):
        method = adapter.config.method(name)
        count = shape_of(adapter.sites[name], "A")[0] // method.r if isinstance(method, Lora) else 1
        other, wanted = first.setdefault(re.sub(r"\d+", "#", name), (name, count))
        where = f"{printable(adapter.where)}: {printable(name)}"
        if count != wanted:
            raise ShapeError(
                f"{where}: the factors are those of {count} matrices by its config's rank, and those of "
                f"{printable(other)} of {wanted}; a damaged rank looks so; save it again, or merge the adapters over "
                "their base, which tells"
            )
        if count > 1 and name.rpartition(".")[2] not in ORDER:
            yield f"{where} is taken for a stack of {count} by its config's rank, since no {BASE_PRINT} tells its shape"


def _modules(sites: Iterable[str], parameters: Collection[str]) -> list[str]:
    return [name for name in sites if name not in parameters]
