"""links: does a graph still find its weights? The headers of the files it points into are as they were."""

import hashlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from surgery.errors import FormatError, InputError, printable
from surgery.io.header import header_length
from surgery.io.regular import contained, open_regular
from surgery.io.strict_json import parse_json

GRAPH = "model.onnx"
HEADERS = "surgery.header_sha256"  # in the metadata: JSON, by file
DATA = "model.onnx.data"  # weights that only the graph has
GRAPH_BYTES = 1 << 31  # what protobuf can hold


def broken_links(folder: Path) -> dict[str, str]:
    """Of each file that the graph in `folder` points into, why it no longer serves; nothing if it does.

    FormatError for a file of that name that is no graph of ours.
    """
    return {name: why for name, digest in _headers(folder).items() if (why := _broken(folder, name, digest))}


def is_exported(folder: Path) -> bool:
    """Is there a graph?"""
    return os.path.lexists(folder / GRAPH)


def _headers(folder: Path) -> Mapping[str, Any]:
    import onnx
    from google.protobuf.message import DecodeError

    where = printable(folder / GRAPH)
    with open_regular(contained(folder, GRAPH), "a graph") as file:
        try:
            model = onnx.load_model_from_string(file.read(GRAPH_BYTES))
        except DecodeError as error:
            raise FormatError(f"{where}: no ONNX file, or cut off; export it again") from error
    told = {one.key: one.value for one in model.metadata_props}
    located = {entry.value for one in model.graph.initializer for entry in one.external_data if entry.key == "location"}
    headers = parse_json(told.get(HEADERS, "{}").encode(), f"{where}: {HEADERS}")
    if not all(isinstance(one, str) for one in headers.values()) or not located <= headers.keys():
        raise FormatError(f"{where}: it does not tell the hashes of the weights it points into; export it again")
    return headers


def _broken(folder: Path, name: str, digest: str) -> str:
    try:
        path = contained(folder, name)
        with open_regular(path, "weights") as file:
            first = file.read(8)
            size = path.stat().st_size
            raw = first + file.read(header_length(first, size, printable(path)) - 8)
    except InputError as error:
        return f"{GRAPH} points into {printable(name)}: {error}"
    same = hashlib.sha256(raw).hexdigest() == digest
    return "" if same else f"its header is not the one that {GRAPH} points into; export again"
