"""The modules that surgery puts into a model: Adapted, Slot and Replaced."""

from surgery.layers.adapted import Adapted, base_of
from surgery.layers.mixed import BASE, Rows
from surgery.layers.replaced import Replaced, Spelled
from surgery.layers.slot import Slot

__all__ = ["BASE", "Adapted", "Replaced", "Rows", "Slot", "Spelled", "base_of"]
