"""JSON as files of ours and others hold it: duplicate keys refused on reading, one spelling on writing."""

import json
from pathlib import Path
from typing import Any

from surgery.errors import FormatError, InputError, printable

JSON_BYTES = 1 << 28  # an index of a million tensors takes a tenth of this


def read_json(path: Path, what: str = "") -> dict[str, Any]:
    """The object in `path`. FormatError unless it is one, with each key once."""
    try:
        if not path.is_file():
            raise InputError(f"{printable(path)}: no such file; {what or 'a JSON file'} is wanted; check the path")
        if path.stat().st_size > JSON_BYTES:
            raise FormatError(f"{printable(path)}: larger than {JSON_BYTES} bytes; that is no {what or 'JSON file'}")
        return parse_json(path.read_bytes(), printable(path))
    except OSError as error:
        raise InputError(f"{printable(path)}: cannot be read ({error.strerror}); check its permissions") from error


def parse_json(data: bytes, where: str) -> dict[str, Any]:
    """The object that `data` spells, in UTF-8."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            names = [name for name, _ in pairs]
            twice = next(name for name in names if names.count(name) > 1)
            raise FormatError(f"{where}: the key {printable(twice)!r} stands twice; each may stand once")
        return found

    try:
        value = json.loads(
            data.decode("utf-8"), object_pairs_hook=unique, parse_constant=_no_constant, parse_int=_whole
        )
        if b"\\ud" in data.lower():  # an escape may spell half a character, which no file name or key can hold
            json.dumps(value, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{where}: not JSON ({printable(error)}); was it cut off or edited?") from error
    if not isinstance(value, dict):
        raise FormatError(f"{where}: a JSON {type(value).__name__}; an object is wanted")
    return value


def _no_constant(text: str) -> Any:
    raise ValueError(f"{text} is no JSON number")


def _whole(text: str) -> int:
    if text == "-0":
        raise ValueError("-0 is no whole number")
    return int(text)


def json_bytes(value: object) -> bytes:
    """`value` with sorted keys, two spaces and a final newline: equal values give equal bytes."""
    return (json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False) + "\n").encode()
