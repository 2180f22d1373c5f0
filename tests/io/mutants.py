"""Mutants: safetensors files whose headers are wrong, or odd, in up to four ways; the same seed, the same files."""

import json
import random
import struct
from collections.abc import Iterator

DTYPES = ("F64", "F32", "F16", "BF16", "I64", "U8", "BOOL", "C64", "F8_E4M3", "F8_E8M0", "F6_E2M3", "F4", "F33", "f32")
BITS = {"F64": 64, "F32": 32, "F16": 16, "BF16": 16, "I64": 64, "U8": 8, "BOOL": 8, "C64": 64, "F6_E2M3": 6, "F4": 4}
NAMES = ("a", "b", "model.layers.0.weight", "", "é", "\U0001f600", "a\n", "\0", "__metadata__", "__metadata", '"', "\\")
NUMBERS = (0, 1, 2, 3, 4, 7, 8, 24, 32, -1, 1 << 31, 1 << 32, 1 << 62, 1 << 63, (1 << 64) - 1, 1 << 64, 10**30)
SPELLED = (
    rb'{ } [ ] , : " \ 0 1 - -0 . 1.0 1e0 00 01 null true NaN Infinity [] {} "" \u0041 \ud800 \ud83d\ude00 \/ \x /**/ '
    rb"""// ' _ +1 "dtype" "shape" "data_offsets" "__metadata__" "F32" "a" "x":1, "x":"1","""
)
TOKENS = (*SPELLED.split(), b" ", b"\n", b"\t", b"\r", b"\x0c", b"\xa0", b"\0", b"\x7f", b"\xff", b"\xef\xbb\xbf")


def mutants(seed: int, count: int) -> Iterator[bytes]:
    chance = random.Random(seed)
    for _ in range(count):
        fields, size = _sound(chance)
        for _ in range(chance.choice((0, 0, 1, 1, 2))):
            fields = _structure(chance, fields)
        text = _spelled(chance, fields)
        for _ in range(chance.choice((0, 0, 0, 1, 1, 2))):
            text = _bytes(chance, text)
        size = max(0, size + chance.choice((0,) * 12 + (-1, 1, 8)))
        length = max(0, len(text) + chance.choice((0,) * 20 + (-1, 1)))
        yield struct.pack("<Q", length) + text + bytes(i & 1 for i in range(size))


def _sound(chance: random.Random) -> tuple[list[tuple[str, object]], int]:
    """A table as pairs, for a key may stand twice, and the bytes that it describes."""
    fields: list[tuple[str, object]] = []
    at = 0
    for name in chance.sample(NAMES[:8], chance.randint(0, 3)):
        dtype, shape = chance.choice(tuple(BITS)), [chance.choice((0, 1, 2, 4)) for _ in range(chance.randint(0, 3))]
        bits = BITS[dtype]
        for extent in shape:
            bits *= extent
        end = at + bits // 8
        fields.append((name, {"dtype": dtype, "shape": shape, "data_offsets": [at, end]}))
        at = end
    chance.shuffle(fields)
    if chance.random() < 0.3:
        fields.insert(0, ("__metadata__", {"format": "pt"}))
    return fields, at


def _structure(chance: random.Random, fields: list[tuple[str, object]]) -> list[tuple[str, object]]:
    if not fields:
        return [(chance.choice(NAMES), chance.choice(({}, [], 1, "x", None)))]
    at = chance.randrange(len(fields))
    name, value = fields[at]
    key = chance.choice(list(value) or ["x"]) if isinstance(value, dict) else "x"
    table = value if isinstance(value, dict) else {}
    instead: list[tuple[str, object]] = chance.choice(
        (
            [],
            [fields[at], fields[at]],
            [(chance.choice(NAMES), value)],
            [(name, {**table, key: _other(chance, table.get(key))})],
            [(name, {k: v for k, v in table.items() if k != key})],
            [(name, {**table, chance.choice(NAMES): 1})],
        )
    )
    return fields[:at] + instead + fields[at + 1 :]


def _other(chance: random.Random, value: object) -> object:
    if isinstance(value, list) and value and chance.random() < 0.8:
        at = chance.randrange(len(value))
        return [*value[:at], chance.choice(NUMBERS), *value[at + 1 :]]
    return chance.choice((chance.choice(DTYPES), chance.choice(NUMBERS), [], {}, None, True, 1.5, [1], [0, 0], ["1"]))


def _spelled(chance: random.Random, fields: list[tuple[str, object]]) -> bytes:
    ascii_only, gap = chance.random() < 0.5, chance.choice(("", " ", "\n\t"))
    pairs = (f"{json.dumps(k, ensure_ascii=ascii_only)}:{gap}{json.dumps(v)}" for k, v in fields)
    return ("{" + f",{gap}".join(pairs) + "}" + " " * chance.choice((0, 0, 3))).encode()


def _bytes(chance: random.Random, text: bytes) -> bytes:
    at = chance.randrange(len(text) + 1)
    match chance.randrange(4):
        case 0:
            return text[:at] + chance.choice(TOKENS) + text[at:]
        case 1:
            return text[:at] + chance.choice(TOKENS) + text[at + 1 :]
        case 2:
            return text[:at] + text[at + chance.randint(1, 3) :]
        case _:
            end = at + chance.randint(1, 20)
            return text[:end] + text[at:end] + text[end:]
