"""leaves: what nested tuples, lists and mappings hold, by the path of their keys."""

from collections.abc import Iterator, Mapping
from typing import Any


def leaves(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """Each with the keys that lead to it, such as `hidden.0`, below `name`; what is None is not there."""
    if isinstance(value, Mapping | list | tuple):
        for key, part in value.items() if isinstance(value, Mapping) else enumerate(value):
            yield from leaves(part, f"{name}.{key}" if name else str(key))
    elif value is not None:
        yield name or "output", value
