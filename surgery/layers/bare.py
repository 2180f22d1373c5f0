"""Bare: an nn.Module that is made in half the time; an injection makes thousands of them."""

from torch import nn

_STATE = nn.Module().__dict__
_SHARED = {name: value for name, value in _STATE.items() if not isinstance(value, dict | set)}
_OWN = [(name, type(value)) for name, value in _STATE.items() if name not in _SHARED]


class Bare(nn.Module):
    """Holds what nn.Module's own __init__ gives it, which calls a function for each attribute."""

    def __init__(self) -> None:
        held = self.__dict__
        held.update(_SHARED)
        for name, kind in _OWN:
            held[name] = kind()
