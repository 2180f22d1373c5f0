"""JSON as files of ours and others hold it: limits and duplicate keys on reading, one spelling on writing."""

import json
from pathlib import Path
from typing import Any

from surgery.errors import EnvironmentFault, FormatError, printable
from surgery.io.regular import open_regular

# Together they keep what a file makes of memory below 256 MB.
JSON_BYTES = 1 << 25  # an index of 250 000 tensors
WIDE_BYTES = 1 << 23  # where a character is not ASCII, each takes up to 4 bytes
VALUES = 500_000
DEPTH = 64


def read_json(path: Path, what: str = "") -> dict[str, Any]:
    """The object in `path`. FormatError unless it is one, within the limits, with each key once."""
    return parse_json(read_bytes(path, what), printable(path))


def read_bytes(path: Path, what: str = "") -> bytes:
    """What lies at `path`, a regular file of JSON_BYTES at most."""
    what = what or "a JSON file"
    with open_regular(path, what) as file:
        try:
            data = file.read(JSON_BYTES + 1)
        except OSError as error:
            raise EnvironmentFault(f"{printable(path)}: reading failed ({error.strerror}); check the disk") from error
    if len(data) > JSON_BYTES:
        raise FormatError(f"{printable(path)}: larger than {JSON_BYTES} bytes, the limit; {what} is wanted")
    return data


def parse_json(data: bytes, where: str) -> dict[str, Any]:
    """The object that `data` spells, in UTF-8, each key once."""
    _check_size(data, where)
    value = parse_value(data, where)
    if not isinstance(value, dict):
        raise FormatError(f"{where}: a JSON {type(value).__name__}; an object is wanted")
    _check_depth(value, where)
    return value


def parse_value(data: bytes, where: str) -> Any:
    """The value that `data` spells, in UTF-8, each key once; nothing else is limited."""
    try:
        value = _DECODER.decode(data.decode("utf-8"))
        if b"\\ud" in data.lower():  # an escape may spell half a character, which no file name or key can hold
            json.dumps(value, ensure_ascii=False).encode()
    except _Twice as error:
        raise FormatError(f"{where}: the key {printable(error)!r} stands twice; each may stand once") from error
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{where}: not JSON ({printable(error)}); was it cut off or edited?") from error
    return value


def json_bytes(value: object) -> bytes:
    """`value` with sorted keys, two spaces and a final newline: equal values give equal bytes."""
    return (json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False) + "\n").encode()


def ordered_json_bytes(value: object) -> bytes:
    """The same with the keys in the order that they have, where it means something."""
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()


class _Twice(Exception):  # noqa: N818  # it never leaves this file
    """A key stands twice."""


def _check_size(data: bytes, where: str) -> None:
    """Counted in the bytes, before anything is made of them; what stands in strings counts too."""
    if len(data) > WIDE_BYTES and not data.isascii():
        raise FormatError(f"{where}: larger than {WIDE_BYTES} bytes, and not all ASCII; escape the rest")
    values = data.count(b",") + data.count(b"[") + data.count(b"{")
    if values > VALUES:
        raise FormatError(f"{where}: about {values} values; the limit is {VALUES}; that is no model's")


def _check_depth(value: Any, where: str) -> None:
    level, depth = [value], 0
    while level:
        if depth > DEPTH:
            raise FormatError(f"{where}: more than {DEPTH} levels of lists and tables, the limit; that is no model's")
        depth += 1
        held = [one.values() if isinstance(one, dict) else one for one in level]
        level = [inner for one in held for inner in one if isinstance(inner, dict | list)]


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        seen: set[str] = set()
        raise _Twice(next(name for name, _ in pairs if name in seen or seen.add(name)))  # type: ignore[func-returns-value]
    return found


def _no_constant(text: str) -> Any:
    raise ValueError(f"{text} is no JSON number")


def _whole(text: str) -> int:
    if text == "-0":
        raise ValueError("-0 is no whole number")
    return int(text)


_DECODER = json.JSONDecoder(object_pairs_hook=_unique, parse_constant=_no_constant, parse_int=_whole)
