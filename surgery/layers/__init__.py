"""The modules that surgery puts into a model: Adapted, Slot, SharedSlot and Replaced."""

from surgery.layers.adapted import Adapted, base_of
from surgery.layers.mixed import BASE, Rows
from surgery.layers.replaced import Replaced, Spelled
from surgery.layers.slot import SharedSlot, Slot, shared_slots

__all__ = ["BASE", "Adapted", "Replaced", "Rows", "SharedSlot", "Slot", "Spelled", "base_of", "shared_slots"]
