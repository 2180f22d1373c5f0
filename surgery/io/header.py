"""The header of a safetensors file, read strictly: every byte of the file belongs to exactly one tensor."""

import json
import re
import struct
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch

from surgery.core.site import Dtype, RawDtype, TensorInfo
from surgery.errors import FormatError, printable
from surgery.io.strict_json import parse_json, parse_value

HEADER_BYTES = 1 << 24  # a sixth of the library's limit, and room for TENSORS with names of 80 characters
TENSORS = 100_000
RANK = 64
NAME_BYTES = 1024
METADATA = "__metadata__"

DTYPES: Mapping[str, Dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
    "F8_E8M0": RawDtype("F8_E8M0", 8),  # torch has it from 2.7 on
    "F6_E2M3": RawDtype("F6_E2M3", 6),
    "F6_E3M2": RawDtype("F6_E3M2", 6),
    "F4": RawDtype("F4", 4),
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
SPELLINGS: Mapping[Dtype, str] = {dtype: spelling for spelling, dtype in DTYPES.items()}

# A header is taken field by field, so that no more of it is held than what has been found sound.
_SPACE = rb"[ \t\n\r]*+"
_STRING = rb'"[^"\\\x00-\x1f]*+(?:\\.[^"\\\x00-\x1f]*+)*+"'
_END = re.compile(_SPACE + rb"\Z")
_CLOSED = re.compile(_SPACE + rb"}")
_KEY = re.compile(_SPACE + b"(" + _STRING + b")" + _SPACE + b":" + _SPACE)
_ENTRY = re.compile(rb"(\{[^{}]{0,4096}+})" + _SPACE + b"([,}])")
_WHOLE = rb"(?:0|[1-9][0-9]{0,18}+)"
_PLAIN = re.compile(  # as every writer spells an entry: what it says needs no JSON parser
    rb'\{"dtype":"(\w{2,16})","shape":\[((?:' + _WHOLE + rb"(?:," + _WHOLE + rb"){0,63}+)?+)\],"
    rb'"data_offsets":\[(' + _WHOLE + rb"),(" + _WHOLE + rb")\]\}"
)
_PAIR = _STRING + _SPACE + b":" + _SPACE + _STRING + _SPACE + b"(?:," + _SPACE + b")?+"
_METADATA = re.compile(rb"(\{" + _SPACE + b"(?:" + _PAIR + b"){0,10000}+})" + _SPACE + b"([,}])")


class Entry(NamedTuple):
    """A tensor of a file and where its bytes begin, counted from the start of the file."""

    info: TensorInfo
    start: int


class Span(NamedTuple):
    """Where a tensor's bytes begin and end, counted from the end of the header."""

    start: int
    end: int
    info: TensorInfo

    def place(self) -> tuple[int, int]:
        return self.start, self.end


class Header(NamedTuple):
    """The tensors of a file in the order of their bytes, and the header's own bytes, length included."""

    entries: tuple[Entry, ...]
    raw: bytes
    metadata: Mapping[str, str]


def parse_header(raw: bytes, file_bytes: int, where: str) -> Header:
    """The header whose bytes are `raw`. FormatError for holes, overlaps, wrong sizes, cut files, or beyond a limit."""
    spans: dict[str, Span] = {}
    metadata: Mapping[str, str] | None = None
    for name, spelled in _fields(raw, where):
        if name in spans or (name == METADATA and metadata is not None):
            raise FormatError(f"{where}: {printable(name)} stands twice in the header; each may stand once")
        if len(spans) == TENSORS:
            raise FormatError(f"{where}: more than {TENSORS} tensors, the limit of a file; split it into shards")
        if name == METADATA:
            metadata = parse_json(spelled, f"{where}: {METADATA}")
        else:
            spans[name] = _span(name, *_entry(name, spelled, where), where)
    entries, at = [], 0
    for start, end, info in sorted(spans.values(), key=Span.place):
        if start != at:
            found = "overlaps the tensor before it" if start < at else f"leaves a hole of {start - at} bytes before it"
            raise FormatError(f"{where}: {printable(info.name)} {found}; the file is damaged")
        entries.append(Entry(info, len(raw) + start))
        at = end
    if len(raw) + at != file_bytes:
        raise FormatError(f"{where}: {file_bytes} bytes, but its header describes {len(raw) + at}; copy it again")
    return Header(tuple(entries), raw, metadata or {})


def header_length(first: bytes, file_bytes: int, where: str) -> int:
    """The length of the whole header, from the file's first 8 bytes."""
    length = struct.unpack("<Q", first)[0] if len(first) == 8 else -1
    if not 2 <= length <= file_bytes - 8:
        raise FormatError(f"{where}: not a safetensors file, or cut off; its first 8 bytes give no header length")
    if length > HEADER_BYTES:
        raise FormatError(f"{where}: a header of {length} bytes; the limit is {HEADER_BYTES}; split it into shards")
    return 8 + int(length)


def encode_header(infos: Sequence[TensorInfo], metadata: Mapping[str, str]) -> bytes:
    """The header of a file that holds `infos` in this order; padded so that the data is 8-byte aligned."""
    fields: dict[str, Any] = {METADATA: dict(sorted(metadata.items()))} if metadata else {}
    at = 0
    for info in infos:
        span = [at, at + info.nbytes]
        fields[info.name] = {"dtype": SPELLINGS[info.dtype], "shape": list(info.shape), "data_offsets": span}
        at += info.nbytes
    text = json.dumps(fields, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def _fields(raw: bytes, where: str) -> Iterator[tuple[str, bytes]]:
    """Each name, and the object behind it as it is spelled."""
    if raw[8:9] != b"{":
        raise FormatError(f"{where}: its header does not begin with {{; a safetensors file is wanted")
    empty = _CLOSED.match(raw, 9)
    at, more = (empty.end(), b"}") if empty else (9, b",")
    while more == b",":
        key = _KEY.match(raw, at)
        if key is None:
            raise FormatError(f"{where}: its header is not JSON at byte {at}; was it cut off or edited?")
        name = _name(key[1], where)
        found = (_METADATA if name == METADATA else _ENTRY).match(raw, key.end())
        if found is None:
            wanted = "a table of strings" if name == METADATA else "an object of dtype, shape and data_offsets"
            raise FormatError(f"{where}: {printable(name)} is not {wanted}, or is too long; the file is damaged")
        at, more = found.end(), found[2]
        yield name, found[1]
    if _END.match(raw, at) is None:
        raise FormatError(f"{where}: its header goes on after its end at byte {at}; was it edited?")


def _name(spelled: bytes, where: str) -> str:
    if len(spelled) > NAME_BYTES + 2:
        raise FormatError(f"{where}: a name of {len(spelled) - 2} bytes; the limit is {NAME_BYTES}; rename the tensor")
    if b"\\" not in spelled and spelled.isascii():  # as nearly all are
        return spelled[1:-1].decode()
    return str(parse_value(spelled, where))


def _entry(name: str, spelled: bytes, where: str) -> tuple[str, Sequence[int], Sequence[int]]:
    """The dtype, shape and data_offsets that an entry gives."""
    plain = _PLAIN.fullmatch(spelled)
    if plain is not None:
        shape = [int(extent) for extent in plain[2].split(b",")] if plain[2] else []
        return plain[1].decode(), shape, (int(plain[3]), int(plain[4]))
    field = parse_value(spelled, where)
    if field.keys() != {"dtype", "shape", "data_offsets"}:
        raise _refused(where, name, "its entry must give dtype, shape and data_offsets; the file is damaged")
    dtype, shape, offsets = field["dtype"], field["shape"], field["data_offsets"]
    if not isinstance(dtype, str):
        raise _refused(where, name, f"dtype {printable(dtype)!r} is not known; known are {', '.join(DTYPES)}")
    if not _naturals(shape) or not _naturals(offsets) or len(offsets) != 2:
        raise _refused(where, name, "shape and data_offsets must be whole numbers from 0; the file is damaged")
    return dtype, shape, offsets


def _span(name: str, dtype: str, shape: Sequence[int], offsets: Sequence[int], where: str) -> Span:
    if dtype not in DTYPES:
        raise _refused(where, name, f"dtype {printable(dtype)!r} is not known; known are {', '.join(DTYPES)}")
    if len(shape) > RANK:
        raise _refused(where, name, f"{len(shape)} dimensions; the limit is {RANK}; reshape the tensor")
    if not _countable(shape):
        raise _refused(where, name, f"shape {printable(shape)} has more elements than a tensor can; is it damaged?")
    info = TensorInfo(name, DTYPES[dtype], tuple(shape))
    nbits, nbytes = info.nbits, offsets[1] - offsets[0]
    if nbits % 8:
        raise _refused(where, name, f"{printable(shape)} {dtype} fills no whole bytes; the file is damaged")
    if 8 * nbytes != nbits:
        given, needed = printable(nbytes), nbits // 8
        raise _refused(where, name, f"{given} bytes, but {needed} are needed for {printable(shape)} {dtype}")
    return Span(offsets[0], offsets[1], info)


def _refused(where: str, name: str, why: str) -> FormatError:
    return FormatError(f"{where}: {printable(name)}: {why}")


def _naturals(values: Any) -> bool:
    return isinstance(values, list) and all(type(value) is int and value >= 0 for value in values)


def _countable(shape: Sequence[int]) -> bool:
    """Does the product of the extents other than 0 stay below 2^63? It is not taken any further."""
    size = 1
    for extent in shape:
        size *= max(extent, 1)
        if size >= 1 << 63:
            return False
    return True
