"""The header of a safetensors file, read strictly: every byte of the file belongs to exactly one tensor."""

import json
import struct
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch

from surgery.core.site import TensorInfo
from surgery.errors import FormatError, printable
from surgery.io.strict_json import parse_json

HEADER_BYTES = 100_000_000  # the limit of the reference implementation

DTYPES: Mapping[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "C64": torch.complex64,
}
SPELLINGS: Mapping[torch.dtype, str] = {dtype: spelling for spelling, dtype in DTYPES.items()}


class Entry(NamedTuple):
    """A tensor of a file and where its bytes begin, counted from the start of the file."""

    info: TensorInfo
    start: int


class Header(NamedTuple):
    """The tensors of a file in the order of their bytes, and the header's own bytes, length included."""

    entries: tuple[Entry, ...]
    raw: bytes
    metadata: Mapping[str, str]


def parse_header(raw: bytes, file_bytes: int, where: str) -> Header:
    """The header whose bytes are `raw`. FormatError for holes, overlaps, wrong sizes or cut files."""
    if raw[8:9] != b"{":
        raise FormatError(f"{where}: its header does not begin with {{; a safetensors file is wanted")
    fields = parse_json(raw[8:], where)
    metadata = fields.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise FormatError(f"{where}: __metadata__ is no table of strings; the file is damaged")
    spans = sorted((_span(name, fields[name], where) for name in fields), key=lambda span: (span[0], span[1]))
    entries, at = [], 0
    for start, end, info in spans:
        if start != at:
            found = "overlaps the tensor before it" if start < at else f"leaves a hole of {start - at} bytes before it"
            raise FormatError(f"{where}: {printable(info.name)} {found}; the file is damaged")
        entries.append(Entry(info, len(raw) + start))
        at = end
    if len(raw) + at != file_bytes:
        raise FormatError(f"{where}: {file_bytes} bytes, but its header describes {len(raw) + at}; copy it again")
    return Header(tuple(entries), raw, metadata)


def header_length(first: bytes, file_bytes: int, where: str) -> int:
    """The length of the whole header, from the file's first 8 bytes."""
    length = struct.unpack("<Q", first)[0] if len(first) == 8 else -1
    if not 2 <= length <= min(HEADER_BYTES, file_bytes - 8):
        raise FormatError(f"{where}: not a safetensors file, or cut off; its first 8 bytes give no header length")
    return 8 + int(length)


def encode_header(infos: Sequence[TensorInfo], metadata: Mapping[str, str]) -> bytes:
    """The header of a file that holds `infos` in this order; padded so that the data is 8-byte aligned."""
    fields: dict[str, Any] = {"__metadata__": dict(sorted(metadata.items()))} if metadata else {}
    at = 0
    for info in infos:
        span = [at, at + info.nbytes]
        fields[info.name] = {"dtype": SPELLINGS[info.dtype], "shape": list(info.shape), "data_offsets": span}
        at += info.nbytes
    text = json.dumps(fields, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def _span(name: str, field: Any, where: str) -> tuple[int, int, TensorInfo]:
    where = f"{where}: {printable(name)}"
    if not isinstance(field, dict) or set(field) != {"dtype", "shape", "data_offsets"}:
        raise FormatError(f"{where}: its entry must give dtype, shape and data_offsets; the file is damaged")
    dtype, shape, offsets = field["dtype"], field["shape"], field["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise FormatError(f"{where}: dtype {printable(dtype)!r} is not known; known are {', '.join(DTYPES)}")
    if not _naturals(shape) or not _naturals(offsets) or len(offsets) != 2:
        raise FormatError(f"{where}: shape and data_offsets must be whole numbers from 0; the file is damaged")
    if not _countable(shape):
        raise FormatError(f"{where}: shape {printable(shape)} has more elements than a tensor can; the file is damaged")
    info = TensorInfo(name, DTYPES[dtype], tuple(shape))
    if offsets[1] - offsets[0] != info.nbytes:
        given = printable(offsets[1] - offsets[0])
        raise FormatError(f"{where}: {given} bytes, but {info.nbytes} are needed for {printable(shape)} {dtype}")
    return offsets[0], offsets[1], info


def _naturals(values: Any) -> bool:
    return isinstance(values, list) and all(type(value) is int and value >= 0 for value in values)


def _countable(shape: list[int]) -> bool:
    """Does the product of the extents other than 0 stay below 2^63? It is not taken any further."""
    size = 1
    for extent in shape:
        size *= max(extent, 1)
        if size >= 1 << 63:
            return False
    return True
