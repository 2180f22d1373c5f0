"""The modules that surgery puts into a model: Adapted, Slot and Replaced."""

from surgery.layers.adapted import Adapted
from surgery.layers.replaced import Replaced
from surgery.layers.slot import Slot

__all__ = ["Adapted", "Replaced", "Slot"]
