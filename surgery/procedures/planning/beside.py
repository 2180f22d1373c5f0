"""Beside: a bias that is made of the weight beside it is made of that weight as its own change takes it."""

from dataclasses import replace

import torch

from surgery.core.site import RawDtype, Site
from surgery.hosts.change import Change
from surgery.procedures.planning.draft import Draft


def follow_weights(draft: Draft) -> None:
    """In the same dtype, which the base's format or an option has told by now."""
    for name, change in draft.changes.items():
        own = None if change.beside is None else draft.changes.get(change.beside.weight.name)
        if own is not None:
            draft.changes[name] = _beside(change, own.site.weight.dtype)


def _beside(change: Change, dtype: torch.dtype | RawDtype) -> Change:
    layers = [one if one.beside is None else one._replace(beside=_in_dtype(one.beside, dtype)) for one in change.layers]
    return replace(change, layers=tuple(layers))


def _in_dtype(site: Site, dtype: torch.dtype | RawDtype) -> Site:
    return replace(site, tensors={**site.tensors, "weight": site.weight._replace(dtype=dtype)})
