"""Fingerprint: one hash that stands for a set of tensors, whatever files they lie in; and surgery.base.json.

An adapter folder may hold that file: the tensors of the base that the adapter was trained on.
"""

import hashlib
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from surgery.core.site import TensorInfo
from surgery.errors import FormatError, printable
from surgery.io.header import DTYPES, SPELLINGS
from surgery.io.regular import contained
from surgery.io.strict_json import json_bytes, read_json

BASE_PRINT = "surgery.base.json"
_FORMAT = 1

Hashed = Mapping[str, tuple[TensorInfo, str]]  # tensors by name, each with sha256 of its bytes


def fingerprint(tensors: Iterable[tuple[TensorInfo, str]]) -> str:
    """sha256 over a line `name dtype shape sha256` for each tensor, sorted."""
    lines = sorted(f"{one.name} {SPELLINGS[one.dtype]} {list(one.shape)} {digest}\n" for one, digest in tensors)
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def base_print_bytes(tensors: Hashed) -> bytes:
    """The content of surgery.base.json."""
    told = {
        name: {"dtype": SPELLINGS[info.dtype], "shape": list(info.shape), "sha256": digest}
        for name, (info, digest) in tensors.items()
    }
    return json_bytes({"format": _FORMAT, "sha256": fingerprint(tensors.values()), "tensors": told})


def read_base_print(folder: Path) -> Hashed:
    """What surgery.base.json in `folder` tells; nothing where there is none. FormatError if it is damaged."""
    path = folder / BASE_PRINT
    if not os.path.lexists(path):
        return {}
    data = read_json(contained(folder, BASE_PRINT), "a fingerprint of a base")
    try:
        found = {name: _entry(name, told) for name, told in data["tensors"].items()}
        whole = data["format"] == _FORMAT and data["sha256"] == fingerprint(found.values())
    except (KeyError, TypeError, AttributeError, ValueError):
        whole = False
    if not whole:
        raise FormatError(f"{printable(path)}: it is damaged; remove it, and the base is not checked")
    return found


def _entry(name: str, told: Mapping[str, Any]) -> tuple[TensorInfo, str]:
    return TensorInfo(name, DTYPES[told["dtype"]], tuple(int(extent) for extent in told["shape"])), str(told["sha256"])
