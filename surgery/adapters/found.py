"""Found: a tensor of an adapter's file; and what those of one site are together."""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from surgery.core.adapter import Stored
from surgery.core.method import Params
from surgery.core.site import TensorInfo


class Found(NamedTuple):
    """A tensor of an adapter: its name there is `info.name`."""

    info: TensorInfo
    load: Callable[[str], Tensor]  # by that name

    @property
    def values(self) -> Tensor:
        return self.load(self.info.name)


def shapes(held: Mapping[str, Found]) -> Mapping[str, tuple[int, ...]]:
    """Of a site's tensors, by role, without reading them."""
    return {role: found.info.shape for role, found in held.items()}


def stored(held: Mapping[str, Found]) -> Params:
    """A site's tensors, to be read when they are asked for."""
    loads = {found.info.name: found.load for found in held.values()}
    return Stored({role: found.info for role, found in held.items()}, lambda name: loads[name](name))


def of_indices(found: Found) -> Found:
    """The same in int32."""
    return Found(found.info._replace(dtype=torch.int32), lambda name: found.load(name).to(torch.int32))
