"""Bad safetensors files by what is wrong with them, and sound ones by what is odd about them, as bytes."""

import json
import struct

DATA = bytes(range(32))
B_TEXT = '"b": {"dtype": "I64", "shape": [1], "data_offsets": [24, 32]}'


def spelled(header: object, data: bytes = DATA, length: int | None = None) -> bytes:
    """The bytes of a file with this header; its length is told as `length` where given."""
    text = header if isinstance(header, bytes) else str(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def entry(
    dtype: str = '"F32"', shape: str = "[2, 3]", offsets: str = "[0, 24]", name: str = '"a"', more: str = ""
) -> bytes:
    """A file of tensors a, as told, and b, which is sound."""
    return spelled(f'{{{name}: {{"dtype": {dtype}, "shape": {shape}, "data_offsets": {offsets}{more}}}, {B_TEXT}}}')


def laid(*offsets: tuple[int, int], data: bytes = DATA) -> bytes:
    """A file of tensors of bytes at `offsets`."""
    fields = {f"t{i}": {"dtype": "U8", "shape": [end - start], "data_offsets": [start, end]}
              for i, (start, end) in enumerate(offsets)}  # fmt: skip
    return spelled(json.dumps(fields), data)


def metadata(text: str) -> bytes:
    return spelled(f'{{"__metadata__": {text}, "a": {{"dtype": "U8", "shape": [32], "data_offsets": [0, 32]}}}}')


def empty(shape: str) -> bytes:
    """A file of one tensor without bytes."""
    return spelled(f'{{"a": {{"dtype": "F32", "shape": {shape}, "data_offsets": [0, 0]}}}}', b"")


SOUND = entry()
HEADER = SOUND[8:-32]
A_TEXT = HEADER[1 : -len(B_TEXT) - 3].decode()

CUTS = {
    "empty": b"",
    "7 bytes": SOUND[:7],
    "the length alone": SOUND[:8],
    "cut in the header": SOUND[:40],
    "cut before the data": SOUND[:-32],
    "cut in the data": SOUND[:-9],
    "the last byte lacks": SOUND[:-1],
    "one byte more": SOUND + b"\0",
    "many bytes more": SOUND + SOUND,
    "length 0": spelled(HEADER, length=0),
    "length 1": spelled(HEADER, length=1),
    "length one short": spelled(HEADER, length=len(HEADER) - 1),
    "length one long": spelled(HEADER, length=len(HEADER) + 1),
    "length of the file": spelled(HEADER, length=len(HEADER) + len(DATA) + 8),
    "length above the limit": spelled(HEADER, length=100_000_001),
    "length 2**63": spelled(HEADER, length=2**63),
    "length 2**64 - 1": spelled(HEADER, length=2**64 - 1),
}
TEXTS = {
    "nothing": spelled(b"  "),
    "a list": spelled(b"[" + HEADER + b"]"),
    "a string": spelled(b'"' + b"a" * 20 + b'"'),
    "null": spelled(b"null"),
    "a space first": spelled(b" " + HEADER),
    "a newline first": spelled(b"\n" + HEADER),
    "a byte order mark": spelled(b"\xef\xbb\xbf" + HEADER),
    "NUL after": spelled(HEADER + b"\0"),
    "two objects": spelled(HEADER + HEADER),
    "a comma too many": spelled(HEADER[:-1] + b",}"),
    "single quotes": spelled(HEADER.replace(b'"', b"'")),
    "invalid UTF-8": entry(name='"é"').replace(b"\xc3\xa9", b"\xc3\x28"),
    "UTF-16": spelled(HEADER.decode().encode("utf-16")),
    "half a surrogate pair": entry(name='"\\ud800"'),
    "half a surrogate pair in the metadata": metadata('{"a": "\\udc80"}'),
    "a control character in a name": entry(name='"a\n"'),
    "deep lists": spelled(b'{"a": ' + b"[" * 100_000 + b"]" * 100_000 + b"}"),
    "deep objects": spelled(b'{"a": ' * 50_000 + b"1" + b"}" * 50_000),
    "deep and open": spelled(b'{"a":' * 50_000),
    "a tensor twice": spelled(f"{{{A_TEXT}, {A_TEXT}, {B_TEXT}}}"),
    "a tensor twice, once escaped": spelled(f"{{{A_TEXT}, {B_TEXT}, {A_TEXT.replace('a', chr(92) + 'u0061', 1)}}}"),
    "a field twice": entry(more=', "dtype": "F32"'),
    "a key of the metadata twice": metadata('{"x": "1", "x": "1"}'),
    "metadata twice": spelled(f'{{"__metadata__": {{}}, "__metadata__": {{}}, {A_TEXT}, {B_TEXT}}}'),
    "metadata a list": metadata('["x"]'),
    "metadata a string": metadata('"x"'),
    **{f"metadata {value}": metadata(f'{{"x": {value}}}') for value in ("1", "null", "true", "[]", "{}", "NaN")},
}
LAYOUTS = {
    "overlap": laid((0, 20), (12, 32)),
    "overlap by one byte": laid((0, 17), (16, 32)),
    "one inside another": laid((0, 32), (8, 16)),
    "the same bytes twice": laid((0, 32), (0, 32)),
    "a hole": laid((0, 8), (16, 32)),
    "a hole of one byte": laid((0, 15), (16, 32)),
    "a hole at the start": laid((1, 32)),
    "a hole at the end": laid((0, 31)),
    "beyond the end": laid((0, 33)),
    "wholly beyond the end": laid((0, 32), (64, 72)),
    "no tensor but data": laid(),
    "an empty tensor inside another": laid((0, 32), (16, 16)),
    "an empty tensor beyond the end": laid((0, 32), (33, 33)),
}
NUMBERS = ("-1", "-0", "1.0", "1e0", "true", "null", '"1"', "[1]", "NaN", "Infinity", "-Infinity", str(2**64))
LONG = "1" + "0" * 5000
ENTRIES = {
    **{f"offset from {number}": entry(offsets=f"[{number}, 24]") for number in NUMBERS},
    **{f"offset to {number}": entry(offsets=f"[0, {number}]") for number in (*NUMBERS, "24.0")},
    **{f"extent {number}": entry(shape=f"[{number}, 6]") for number in NUMBERS},
    **{f"offsets {text}": entry(offsets=text) for text in ("[24, 0]", "[0]", "[0, 12, 24]", "[]", "{}", "null", "24")},
    **{f"shape {text}": entry(shape=text) for text in ("[2, 4]", "[5]", "[7]", "[]", "[0]", "6", "null", "{}", '"23"')},
    **{f"dtype {text}": entry(dtype=text) for text in ('"F33"', '"f32"', '""', "null", "32", '["F32"]', '"F64"')},
    "an offset of 5001 digits": entry(offsets=f"[0, {LONG}]"),
    "an extent of 5001 digits": entry(shape=f"[{LONG}, 6]"),
    "two negative extents": entry(shape="[-2, -3]"),
    "a product beyond 64 bits": entry(shape=f"[{2**62}, {2**62}]"),
    "a product that is 6 in 64 bits": entry(shape=f"[{2**63 + 3}, 2]"),
    "a product of 8000 digits": entry(shape=f"[1{'0' * 4000}, 1{'0' * 4000}]"),
    "a product of 400 000 digits": entry(shape=f"[{', '.join([str(2**63)] * 20_000)}]"),
    "a product beyond 64 bits, times 0": empty(f"[{2**62}, {2**62}, 0]"),
    "0 times a product beyond 64 bits": empty(f"[0, {2**62}, {2**62}]"),
    "0 times an extent beyond 64 bits": empty(f"[0, {2**64}]"),
    "an extent that is minus nothing": empty("[-0]"),
    "no dtype": entry().replace(b'"dtype": "F32", ', b""),
    "no shape": entry().replace(b'"shape": [2, 3], ', b""),
    "no offsets": entry().replace(b', "data_offsets": [0, 24]', b""),
    "a field too many": entry(more=', "stride": [3, 1]'),
    "an entry that is a list": spelled(f'{{"a": ["F32", [2, 3], [0, 24]], {B_TEXT}}}'),
    "an entry that is null": spelled(f'{{"a": null, {B_TEXT}}}'),
    "an empty entry": spelled(f'{{"a": {{}}, {B_TEXT}}}'),
}
ZOO = CUTS | TEXTS | LAYOUTS | ENTRIES
SOUNDS = {
    "two tensors": SOUND,
    "one": laid((0, 32)),
    "header in another order than the bytes": laid((8, 32), (0, 8)),
    "empty tensors": laid((32, 32), (0, 0), (0, 32), (0, 0)),
    "metadata": metadata('{"x": "1"}'),
    "no metadata": metadata("{}"),
    "spaces after the header": spelled(HEADER + b"   "),
    "no tensor": spelled("{}", b""),
    "a whole surrogate pair": entry(name='"\\ud83d\\ude00"'),
    "no name": entry(name='""'),
}
