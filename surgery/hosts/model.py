"""Model: a live nn.Module as a place of sites, and what recognises the op of a module."""

import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from surgery.core.codec import Packed
from surgery.core.op import Op
from surgery.core.site import Site, TensorInfo
from surgery.core.source import TILE_ELEMENTS, row_tiles
from surgery.ops import OPS
from surgery.ops.convolution import Convolution


def op_of(module: nn.Module) -> Op | None:
    """The op of a module's weight. None if it is none of ours, or a subclass that computes otherwise."""
    for kind, name in _kinds():
        if isinstance(module, kind):
            if not _computes_as(module, kind):
                return None
            return _convolution(module) if name == Convolution.name else OPS[name]
    return None


def _kinds() -> Iterator[tuple[type[nn.Module], str]]:
    yield nn.Linear, "linear"
    yield nn.Embedding, "embedding"
    for kind in (nn.Conv1d, nn.Conv2d, nn.Conv3d):
        yield kind, "convolution"
    transformers = sys.modules.get("transformers.pytorch_utils")
    if transformers is not None:
        yield transformers.Conv1D, "conv1d"


def _computes_as(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Are the methods that say what it computes those of `kind`?"""
    told = {name: kind.__dict__.get(name) for name in ("forward", "_conv_forward")}
    return all(own is None or getattr(type(module), name) is own for name, own in told.items())


def _convolution(module: Any) -> Convolution:
    """With the module's geometry."""
    return Convolution(
        kernel=module.kernel_size,
        stride=module.stride,
        padding=module.padding,
        dilation=module.dilation,
        groups=module.groups,
        padding_mode=module.padding_mode,
    )


def unfit(module: nn.Module) -> str | None:
    """Why a module of a known kind can bear no adapter all the same, and the next step; None if it can."""
    weight = module._parameters.get("weight")
    if weight is None:
        return "its weight is computed from other tensors; remove the parametrization first"
    if isinstance(weight, nn.UninitializedParameter):
        return "its weight has no shape yet; call the model once first"
    if getattr(module, "max_norm", None) is not None:
        return "its max_norm changes the weight in each forward, so that no merge holds; set it to None first"
    return None


def live_site(name: str, module: nn.Module, op: Op) -> Site:
    """The site that a module is."""
    held = {role: values for role, values in module._parameters.items() if values is not None}
    return Site(name, {role: _info(f"{name}.{role}", values) for role, values in held.items()}, op)


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

    def sites(self) -> Iterable[Site]:
        return self._sites

    def load(self, site: Site, rows: slice | None = None) -> Packed:
        weight = self.weight(site)
        return Packed({"weight": weight if rows is None else weight[rows]})

    def parts(self, sites: Iterable[Site]) -> Sequence["LivePart"]:
        return [LivePart(self, list(sites))]

    def weight(self, site: Site) -> Tensor:
        """The weight's own memory, outside autograd."""
        return self.parameters[site.name].detach()


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
            self.live.weight(site).copy_(self.fresh)
            self.live.stored.add(site.name)

    def close(self) -> None:
        """Nothing is left to do."""


def _info(name: str, values: Tensor) -> TensorInfo:
    return TensorInfo(name, values.dtype, tuple(values.shape))
