"""Model: a live nn.Module as a place of sites."""

from collections.abc import Iterable, Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from surgery.codecs.plain import PLAIN_DTYPES
from surgery.core.codec import Packed
from surgery.core.op import Op
from surgery.core.sharded import fill, is_sharded, whole
from surgery.core.site import Site, TensorInfo
from surgery.core.source import GPU_TILE_ELEMENTS, TILE_ELEMENTS, row_tiles
from surgery.errors import MatchError, printable
from surgery.hosts.quantized import compute_dtype, decoded, is_quantized, packed_of_layer, shape_of_layer
from surgery.hosts.recognition import op_of, unfit
from surgery.ops.experts import parameter_op


def live_site(name: str, module: nn.Module, op: Op) -> Site:
    """The site that a module is."""
    roles = {own: role for role, own in op.roles.items()}
    return Site(name, {roles.get(own, own): info for own, info in _infos(name, module).items()}, op)


def parameter_site(name: str, module: nn.Module) -> Site:
    """The site that one of a module's parameters is, by its full name. MatchError for one that cannot be."""
    own = name.rpartition(".")[2]
    values = module._parameters[own]
    assert values is not None
    if isinstance(values, nn.UninitializedParameter):
        raise MatchError(f"{printable(name)}: it has no shape yet; call the model once first")
    if values.dim() not in (2, 3) or values.dtype not in PLAIN_DTYPES:
        found = f"{list(values.shape)} in {str(values.dtype).removeprefix('torch.')}"
        raise MatchError(
            f"{printable(name)}: {found}; floats of two or three axes, of 16 bits or more, can be adapted; name others"
        )
    if values.dim() == 3 and not values.is_contiguous():
        raise MatchError(f"{printable(name)}: its memory is in another order than its axes; make it contiguous first")
    op = parameter_op(own, tuple(values.shape), getattr(module, "is_transposed", False) is True)
    return Site(name, {"weight": TensorInfo(name, values.dtype, tuple(values.shape))}, op)


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
        infos = _infos(name, module)
        same = weights[id(module._parameters.get("weight"))] if "weight" in infos else [name]
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
        """The weight's own memory, outside autograd, as its tiles are taken of it; of one in shares, a copy."""
        held = self.parameters[site.name].detach()
        if is_sharded(held):
            held = self._whole(site.name, held)
        return held.view(site.laid(site.weight).shape) if site.acting.alone else held

    def put(self, site: Site, fresh: Tensor) -> None:
        """The site's weight becomes `fresh`, which is laid as its tiles are."""
        held = self.parameters[site.name].detach()
        fill(held, fresh.view(held.shape))
        self._gathered = None
        self.stored.add(site.name)

    def _whole(self, name: str, held: Tensor) -> Tensor:
        if self._gathered is None or self._gathered[0] != name:
            self._gathered = name, whole(held)
        return self._gathered[1]


class LivePart:
    """All of them, one after another."""

    def __init__(self, live: LiveWeights, sites: Sequence[Site]) -> None:
        self.live, self.sites = live, sites
        self.fresh = torch.empty(0)  # the weight at hand, until it is whole

    def tiles(self, site: Site) -> Iterator[slice]:
        self.fresh = torch.empty_like(self.live.weight(site), memory_format=torch.contiguous_format)
        elements = TILE_ELEMENTS if self.fresh.is_cpu else GPU_TILE_ELEMENTS
        return row_tiles(site.laid(site.weight).shape, elements, site.together)

    def store(self, site: Site, packed: Packed, rows: slice) -> None:
        self.fresh[rows] = packed.tensors["weight"]
        if rows.stop >= self.fresh.shape[0]:
            self.live.put(site, self.fresh)

    def close(self) -> None:
        """Nothing is left to do."""


def _infos(name: str, module: nn.Module) -> dict[str, TensorInfo]:
    """Of its parameters; of a quantized weight, what it decodes to."""
    infos = {
        own: TensorInfo(f"{name}.{own}".lstrip("."), values.dtype, tuple(values.shape))
        for own, values in module._parameters.items()
        if values is not None
    }
    if is_quantized(module) and unfit(module) is None:
        beside = packed_of_layer(module, name).tensors.keys() - {"weight"}
        infos = {own: info for own, info in infos.items() if own not in beside}
        infos["weight"] = infos["weight"]._replace(dtype=compute_dtype(module), shape=shape_of_layer(module))
    return infos


def stored_weight(module: nn.Module, op: Op) -> Tensor:
    """The weight of a module that is a site, as it is stored, outside autograd; decoded where it is quantized."""
    held: Tensor = decoded(module) if is_quantized(module) else getattr(module, op.roles.get("weight", "weight"))
    return whole(held.detach())
