"""Model: a live nn.Module as a place of sites."""

from collections.abc import Iterable, Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from surgery.core.codec import Packed
from surgery.core.op import Op
from surgery.core.sharded import fill, is_sharded, whole
from surgery.core.site import Site, TensorInfo
from surgery.core.source import TILE_ELEMENTS, row_tiles
from surgery.hosts.recognition import op_of


def live_site(name: str, module: nn.Module, op: Op) -> Site:
    """The site that a module is."""
    roles = {own: role for role, own in op.roles.items()}
    held = {own: values for own, values in module._parameters.items() if values is not None}
    return Site(name, {roles.get(own, own): _info(f"{name}.{own}", values) for own, values in held.items()}, op)


def model_sites(root: nn.Module) -> list[Site]:
    """Every module with parameters of its own, each once; further paths to it are aliases."""
    paths: dict[int, list[str]] = {}
    weights: dict[int, list[str]] = {}
    modules = {}
    for name, module in root.named_modules(remove_duplicate=False):
        if any(values is not None for values in module._parameters.values()):
            paths.setdefault(id(module), []).append(name)
            modules[id(module)] = module
    for key, names in paths.items():
        weights.setdefault(id(modules[key]._parameters.get("weight")), []).append(names[0])
    found = []
    for key, (name, *aliases) in paths.items():
        module, op = modules[key], op_of(modules[key])
        held = {role: values for role, values in module._parameters.items() if values is not None}
        infos = {role: _info(f"{name}.{role}".lstrip("."), values) for role, values in held.items()}
        same = weights[id(module._parameters.get("weight"))] if "weight" in held else [name]
        found.append(Site(name, infos, op, tuple(aliases), tuple(other for other in same if other != name)))
    return found


class LiveWeights:
    """Some parameters, by site, as a source, and as a sink that puts each new one in place at once, whole."""

    def __init__(self, parameters: Mapping[str, Tensor], sites: Iterable[Site]) -> None:
        self.parameters, self._sites = parameters, list(sites)
        self.stored: set[str] = set()  # the sites that hold their new weight
        self._gathered: tuple[str, Tensor] | None = None  # the last that each process holds a share of

    def sites(self) -> Iterable[Site]:
        return self._sites

    def load(self, site: Site, rows: slice | None = None) -> Packed:
        weight = self.weight(site)
        return Packed({"weight": weight if rows is None else weight[rows]})

    def parts(self, sites: Iterable[Site]) -> Sequence["LivePart"]:
        return [LivePart(self, list(sites))]

    def weight(self, site: Site) -> Tensor:
        """The weight's own memory, outside autograd; of one in shares, a copy of the whole."""
        held = self.parameters[site.name].detach()
        if not is_sharded(held):
            return held
        if self._gathered is None or self._gathered[0] != site.name:
            self._gathered = site.name, whole(held)
        return self._gathered[1]

    def put(self, site: Site, fresh: Tensor) -> None:
        """The site's weight becomes `fresh`."""
        fill(self.parameters[site.name].detach(), fresh)
        self._gathered = None
        self.stored.add(site.name)


class LivePart:
    """All of them, one after another."""

    def __init__(self, live: LiveWeights, sites: Sequence[Site]) -> None:
        self.live, self.sites = live, sites
        self.fresh = torch.empty(0)  # the weight at hand, until it is whole

    def tiles(self, site: Site) -> Iterator[slice]:
        self.fresh = torch.empty_like(self.live.weight(site), memory_format=torch.contiguous_format)
        return row_tiles(site.weight.shape, TILE_ELEMENTS)

    def store(self, site: Site, packed: Packed, rows: slice) -> None:
        self.fresh[rows] = packed.tensors["weight"]
        if rows.stop >= self.fresh.shape[0]:
            self.live.put(site, self.fresh)

    def close(self) -> None:
        """Nothing is left to do."""


def _info(name: str, values: Tensor) -> TensorInfo:
    return TensorInfo(name, values.dtype, tuple(values.shape))
