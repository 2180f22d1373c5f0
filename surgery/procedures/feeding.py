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
    for name in held:
        draft.changes[name] = fed(draft.changes[name])
    count = sum(draft.changes[name].feedback for name in held)
    draft.notes.append(f"{count} of {len(held)} adapted weights are rounded with feedback")


def fed(change: Change) -> Change:
    """The change of a weight that goes into a format, rounded with feedback where its layers know directions."""
    if not _is_fed(change):
        return change
    return replace(change, site=_in_large_tiles(change.site) if change.keep else change.site, feedback=True)


def _is_fed(change: Change) -> bool:
    linear = change.site.op is not None and change.site.op.name == Linear.name
    return linear and feedback_of(replace(change, feedback=True), change.started()) is not None


def _in_large_tiles(site: Site) -> Site:
    """Of whole rows, as many as are rounded at a time."""
    rows = max(1, FED_ELEMENTS // max(1, math.prod(site.weight.shape[1:])))
    return replace(site, together=site.together * -(-rows // site.together))
