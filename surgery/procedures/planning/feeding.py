"""Feeding: weights that go into a format get other codes than the nearest, where these serve their inputs better."""

import math
from dataclasses import replace

from surgery.core.site import Site
from surgery.hosts.calibration import Calibration
from surgery.hosts.change import Change, directions_of
from surgery.hosts.rounding import FED_ELEMENTS
from surgery.ops.linear import Linear
from surgery.procedures.planning.draft import Draft

_WEIGHT = ".weight"


def feed_back(draft: Draft, calibration: Calibration | None) -> None:
    """Of all changes of which the calibration, or else the layers, tell which inputs matter."""
    called = draft.base.called() if calibration is not None else str
    held = [name for name, change in draft.changes.items() if (change.into or change.keep) and change.layers]
    modules = {name: called(name).removesuffix(_WEIGHT) for name in held}
    if calibration is not None:
        calibration.refuse_other(list(modules.values()))
    for name, module in modules.items():
        draft.changes[name] = fed(draft.changes[name], calibration, module)
    count = sum(draft.changes[name].feedback for name in held)
    known = sum(draft.changes[name].calibrated is not None for name in held)
    by = f", {known} of them by calibration inputs" if calibration is not None else ""
    draft.notes.append(f"{count} of {len(held)} adapted weights are rounded with feedback{by}")


def fed(change: Change, calibration: Calibration | None, module: str) -> Change:
    """The change of a module's weight that goes into a format, with feedback where something tells what matters."""
    if calibration is not None and _is_linear(change):
        change = replace(change, calibrated=calibration.of(module, change.site.shape[1]))
    if not _is_fed(change):
        return change
    return replace(change, site=_in_large_tiles(change.site), feedback=True)


def _is_fed(change: Change) -> bool:
    return _is_linear(change) and (change.calibrated is not None or directions_of(change) is not None)


def _is_linear(change: Change) -> bool:
    return change.site.op is not None and change.site.op.name == Linear.name


def _in_large_tiles(site: Site) -> Site:
    """Of whole rows, as many as are rounded at a time."""
    rows = max(1, FED_ELEMENTS // max(1, math.prod(site.weight.shape[1:])))
    return replace(site, together=site.together * -(-rows // site.together))
