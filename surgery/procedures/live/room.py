"""room: adapters held so that others take their places, of other ranks and scalings, while what is compiled stays."""

from collections.abc import Mapping
from dataclasses import replace

import torch

from surgery.core.adapter import Adapter
from surgery.errors import printable
from surgery.layers import Adapted
from surgery.methods.lora_room import room_for
from surgery.procedures.live.fitting import Fitting


def with_room(fitting: Fitting, rank: int, adapter: Adapter) -> Fitting:
    """The same with room for ranks up to `rank` wherever there can be; elsewhere only equals can be swapped.

    ShapeError for a rank that is larger already.
    """
    tied = {*fitting.heads, *fitting.heads.values()}  # whose factors others read as they are
    free = {name: one for name, one in fitting.sites.items() if name not in tied}
    found = {name: room_for(method, rank, site) for name, (site, method, _) in free.items()}
    rooms = {name: room for name, room in found.items() if room is not None}
    sites = dict(fitting.sites)
    for name, room in rooms.items():
        site, method, params = sites[name]
        sites[name] = site, method, room.laid(method, params, f"{printable(adapter.where)}: {printable(name)}")
    return replace(fitting, sites=sites, rooms=rooms)


def with_zeros(fitting: Fitting, layers: Mapping[str, Adapted], adapter_name: str) -> Fitting:
    """The same with zeros where it lies over less than the adapter, which has room, whose place it is to take."""
    sites = dict(fitting.sites)
    for name, layer in layers.items():
        if name not in sites and layer.fitted[adapter_name].has_room:
            method = fitting.config.method(name)
            zeros = {role: torch.zeros(spec.shape) for role, spec in method.tensors(layer.site).items()}
            sites[name] = layer.site, method, zeros
    return replace(fitting, sites=sites)
