"""The keys in which two config.json differ, nested ones by their dotted path."""

import json
from collections.abc import Iterator, Mapping
from typing import Any

Sides = Mapping[str, Any]  # the value in "a" and in "b", where it is there
Path = tuple[str, ...]


def config_difference(a: Mapping[str, Any], b: Mapping[str, Any]) -> dict[str, Sides]:
    """By dotted path. 1, 1.0 and true are three values, as they are in JSON.

    >>> config_difference({"text_config": {"vocab_size": 8}, "dtype": "float16"}, {"text_config": {"vocab_size": 9}})
    {'dtype': {'a': 'float16'}, 'text_config.vocab_size': {'a': 8, 'b': 9}}
    """
    leaves = {"a": dict(_leaves(a)), "b": dict(_leaves(b))}
    found: dict[str, Sides] = {}
    for path in sorted(leaves["a"].keys() | leaves["b"].keys()):
        told = {side: here[path] for side, here in leaves.items() if path in here}
        if len(told) < 2 or told["a"] != told["b"]:
            found[".".join(path)] = {side: json.loads(text, parse_constant=str) for side, text in told.items()}
    return found


def _leaves(config: Mapping[str, Any]) -> Iterator[tuple[Path, str]]:
    """Each value that is no table, or an empty one, in one spelling."""
    waiting: list[tuple[Path, Any]] = [((), config)] if config else []
    while waiting:
        path, value = waiting.pop()
        if isinstance(value, dict) and value:
            waiting += [((*path, key), one) for key, one in value.items()]
        else:
            yield path, json.dumps(value, sort_keys=True)
