"""Feeding: weights that go into a format get other codes than the nearest, where these serve their adapters better."""

import math
from dataclasses import replace

from surgery.core.site import Site
from surgery.hosts.change import Change
from surgery.hosts.rounding import FED_ELEMENTS, feedback_of
from surgery.ops.linear import Linear
from surgery.procedures.draft import Draft


def feed_back(draft: Draft) -> None:
    """Of all changes whose layers know along which directions they look at their inputs."""
    held = [name for name, change in draft.changes.items() if (change.into or change.keep) and change.layers]
    fed = [name for name in held if _is_fed(draft.changes[name])]
    for name in fed:
        change = draft.changes[name]
        site = _in_large_tiles(change.site) if change.keep else change.site
        draft.changes[name] = replace(change, site=site, feedback=True)
    draft.notes.append(f"{len(fed)} of {len(held)} adapted weights are rounded with feedback")


def _is_fed(change: Change) -> bool:
    linear = change.site.op is not None and change.site.op.name == Linear.name
    return linear and feedback_of(replace(change, feedback=True), change.started()) is not None


def _in_large_tiles(site: Site) -> Site:
    """Of whole rows, as many as are rounded at a time."""
    rows = max(1, FED_ELEMENTS // max(1, math.prod(site.weight.shape[1:])))
    return replace(site, together=site.together * -(-rows // site.together))
