"""Adapter: one config plus its tensors, by site and shared; and layer, one method with its tensors at one site."""

import hashlib
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import NamedTuple

from torch import Tensor

from surgery.core.config import AdapterConfig
from surgery.core.method import Method, Params, Product
from surgery.core.site import Site, TensorInfo
from surgery.core.spec import Spec


class Stored(Mapping[str, Tensor]):
    """Params that lie in a file: each is read whenever it is asked for, by its name there, and not kept.

    Others are in memory: those that sites share, once for all of them, and what is made for all together.
    """

    def __init__(
        self,
        infos: Mapping[str, TensorInfo],
        load: Callable[[str], Tensor],
        others: Mapping[str, Tensor] = MappingProxyType({}),
    ) -> None:
        self.infos, self.load, self.others = infos, load, others  # by role; load by a name in the file

    def __getitem__(self, role: str) -> Tensor:
        return self.others[role] if role in self.others else self.load(self.infos[role].name)

    def __iter__(self) -> Iterator[str]:
        return iter((*self.infos, *self.others))

    def __len__(self) -> int:
        return len(self.infos) + len(self.others)


def shape_of(params: Params, role: str) -> tuple[int, ...]:
    """Without reading it."""
    stored = isinstance(params, Stored) and role in params.infos
    return params.infos[role].shape if stored else tuple(params[role].shape)  # type: ignore[attr-defined]


def shapes_of(params: Params) -> Mapping[str, tuple[int, ...]]:
    """Of all its tensors, by role, without reading them."""
    return {role: shape_of(params, role) for role in params}


def are_as_told(params: Params, specs: Mapping[str, Spec]) -> bool:
    """Are they the tensors of these specs, in their shapes? What is made for all sites may be yet to come."""
    shapes = shapes_of(params)
    wanted = {role for role, spec in specs.items() if role in shapes or not (spec.shared or spec.dealt)}
    return shapes.keys() == wanted and all(specs[role].fits(shape) for role, shape in shapes.items())


def nbytes_of(params: Params, but: Collection[str] = ()) -> int:
    """Of all its tensors but those of some roles, without reading them."""
    held = params.infos if isinstance(params, Stored) else params
    return sum(one.nbytes for role, one in held.items() if role not in but)


def _with_others(params: Params, others: Params) -> Params:
    if isinstance(params, Stored):
        return Stored(params.infos, params.load, {**params.others, **others})
    return {**params, **others}


class Layer(NamedTuple):
    """One method with its tensors: what is laid over one site; and where it comes from, of several adapters."""

    method: Method
    params: Params
    adapter: int = 0
    name: str = ""  # of the site, as the adapter has it
    sums: Tensor | None = None  # along what the method couples, of the whole weight
    beside: Site | None = None  # whose weight that is, where it is not the one that the layer is laid over

    @property
    def told(self) -> Params:
        """The tensors, and what the sums tell where these are known."""
        return self.params if self.sums is None else self.method.told(self.params, self.sums)


Started = Sequence[tuple[Layer, Product]]  # layers with their tensors in memory, and what their tiles share


def bias_layers(layers: Iterable[Layer], site: Site) -> tuple[Layer, ...]:
    """What layers over the weight of a site lay over the bias beside it."""
    found = ((layer, layer.method.for_bias()) for layer in layers)
    return tuple(
        layer._replace(method=method, beside=site if method.couples else None)
        for layer, method in found
        if method is not None
    )


class Weighted(NamedTuple):
    """An adapter and how strongly it applies."""

    adapter: "Adapter"
    weight: float = 1.0


@dataclass(frozen=True)
class Adapter:
    """A config, its tensors by site and role, and what else its files carry."""

    config: AdapterConfig
    sites: Mapping[str, Params]
    saved: Mapping[str, Tensor] = field(default_factory=dict)  # full tensors by base name: modules_to_save, biases
    copies: Mapping[str, Tensor] = field(default_factory=dict)  # copies of the base's own tensors
    ops: Mapping[str, str] = field(default_factory=dict)  # by site, where the spelling of its tensors tells
    where: str = "adapter"
    sha256: Mapping[str, str] = field(default_factory=dict)  # by tensor, as the file spells it, and by file
    hub_id: str | None = None  # the repository of the Hub that it came from, and the commit
    commit: str | None = None
    files: tuple[str, ...] = ()  # those of `sha256` that are files
    trained_on: Mapping[str, tuple[TensorInfo, str]] = field(default_factory=dict)  # base tensors, with their sha256
    targets: frozenset[str] = frozenset()  # modules of `saved` that its config targets; the others it saves besides
    biases: frozenset[str] = frozenset()  # those of `saved` that are single biases of the base
    mha_out_proj_scale: int | None = None  # how often a delta of out_proj in its files counts, if there is one
    shared: Mapping[str, Tensor] = field(default_factory=dict)  # by role: those that all sites have, among their own

    def completed(self, sites: Collection[Site]) -> "Adapter":
        """With the shared tensors that its config alone makes, where its files hold none; it lies over all `sites`."""
        drawn = self.config.drawn(sites) if sites and not self.shared else {}
        return self.sharing(drawn) if drawn else self

    def dealt(self, sites: Mapping[str, Site]) -> "Adapter":
        """With what its files lack of the tensors that are made for all `sites` together, which stand in order."""
        made = self.config.dealt(sites)
        lacking = {name: {k: v for k, v in made[name].items() if k not in p} for name, p in self.sites.items()}
        return replace(self, sites={name: _with_others(p, lacking[name]) for name, p in self.sites.items()})

    def sharing(self, shared: Mapping[str, Tensor]) -> "Adapter":
        """With these at each site."""
        return replace(self, shared=shared, sites={name: _with_others(p, shared) for name, p in self.sites.items()})

    @property
    def is_unplaced(self) -> bool:
        """Do its files hold what its sites share, and leave these to be told by the config and a model?"""
        return bool(self.shared) and not self.sites and frozenset() in self.config.forms()

    def named_shared(self) -> dict[str, Tensor]:
        """Those that sites share, by PEFT's names of them."""
        return self.config.spelled_shared(self.shared)

    def site_bytes(self) -> list[int]:
        """Of each site the tensors that are its own."""
        return [nbytes_of(params, self.shared) for params in self.sites.values()]

    def shared_bytes(self) -> int:
        """Of those that sites share."""
        return nbytes_of(self.shared)

    @property
    def digest(self) -> str:
        """What `sha256sum adapter_config.json adapter_model.safetensors | sha256sum` gives."""
        lines = "".join(f"{self.sha256[name]}  {name}\n" for name in sorted(self.files))
        return hashlib.sha256(lines.encode()).hexdigest()
