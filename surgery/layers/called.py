"""How callers name what they give to a layer that is wrapped."""

from inspect import Parameter, signature
from typing import Any

from torch import nn


def inputs_of(layer: nn.Module, given: tuple[Any, ...], named: dict[str, Any]) -> tuple[Any, ...]:
    """What is given by position, or else the layer's own input, taken out of what is named.

    Nothing where neither holds one: the layer itself then says what it lacks, or does not know.
    """
    if given or not named:
        return given
    own = list(signature(type(layer).forward).parameters.values())[1:]
    told = own and own[0].kind is Parameter.POSITIONAL_OR_KEYWORD  # *args tell no name
    name = own[0].name if told else next(iter(named))
    return (named.pop(name),) if name in named else ()
