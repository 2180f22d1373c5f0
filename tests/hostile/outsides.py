"""What lies where a file should, or beside it: links that lead out, pipes and devices, and sheer size."""

import json
import os
import socket
import struct
from collections.abc import Callable
from pathlib import Path

import torch
from damages import BASE_CONFIG, CONFIG, INDEX, SHARD, SHARDS, TENSORS, Damage, Damages, write
from safetensors.torch import save_file

A = "base_model.model.1.lora_A.weight"


def header(file: str, fields: object, data: bytes = b"", **more: int) -> Damage:
    """The file with this header, made when it is needed if callable; sparse up to `size`, if given."""

    def damage(folder: Path) -> None:
        text = fields() if callable(fields) else json.dumps(fields).encode()
        (folder / file).write_bytes(struct.pack("<Q", more.get("length", len(text))) + text + data)
        if "size" in more:
            os.truncate(folder / file, more["size"])

    return damage


def shaped(shape: list[int], dtype: str = "F32", size: int | None = None) -> dict[str, object]:
    """A header of one tensor of that shape."""
    count = 4
    for extent in shape:
        count *= extent
    return {"1.weight": {"dtype": dtype, "shape": shape, "data_offsets": [0, count if size is None else size]}}


def instead(file: str, make: Callable[[Path], object]) -> Damage:
    def damage(folder: Path) -> None:
        (folder / file).unlink(missing_ok=True)
        make(folder / file)

    return damage


def out_of(file: str) -> Damage:
    """The file lies outside, sound, and a link leads there."""

    def damage(folder: Path) -> None:
        (folder / "elsewhere").mkdir()
        place = folder / "elsewhere" / Path(file).name
        (folder / file).rename(place)
        (folder / file).symlink_to(place)

    return damage


def beside(file: str, make: Callable[[Path], object]) -> Damage:
    """Something more in the base's folder."""
    return lambda folder: make(folder / "base" / file)


def a_socket(path: Path) -> None:
    here = Path.cwd()
    os.chdir(path.parent)  # the name of a socket is short
    try:
        with socket.socket(socket.AF_UNIX) as opened:
            opened.bind(path.name)
    finally:
        os.chdir(here)


def link_to(target: str) -> Callable[[Path], None]:
    return lambda path: path.symlink_to(target)


def huge(path: Path) -> None:
    path.write_bytes(b"{}")
    os.truncate(path, 1 << 40)


def text_of(text: bytes | Callable[[], bytes]) -> Callable[[Path], object]:
    return lambda path: path.write_bytes(text() if callable(text) else text)


def deep(levels: int) -> bytes:
    return b'{"x": ' + b"[" * levels + b"]" * levels + b"}"


def empty_tensors(count: int, more: bytes = b"") -> bytes:
    one = b'"%d":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}'
    return b"{" + b",".join(one % i for i in range(count)) + more + b"}"


def keys(count: int, more: bytes = b"") -> bytes:
    return b"{" + b",".join(b'"%d":1' % i for i in range(count)) + more + b"}"


def many_strangers(folder: Path) -> None:
    """A base of many tensors, and an adapter of many sites, none of which is there."""
    names = [f"layers.{i}.mlp.experts.{j}.up_proj" for i in range(100) for j in range(50)]
    there = {f"{name}.weight": SHARDS[0] for name in names} | {f"1.{role}": SHARDS[1] for role in ("weight", "bias")}
    write(folder / INDEX, {"weight_map": there})
    tensors = {f"{name}.weight": torch.zeros(4, 2) for name in names}
    save_file(tensors, folder / "base" / SHARDS[0])
    pairs = {
        f"base_model.model.{name.replace('experts', 'expert')}.lora_{role}.weight": torch.zeros(2, 2)
        for name in names[:1000]
        for role in "AB"
    }
    save_file(pairs, folder / TENSORS)


def both(*damages: Damage) -> Damage:
    def damage(folder: Path) -> None:
        for one in damages:
            one(folder)

    return damage


SIZES: Damages = {
    "a terabyte of nothing as a shard": instead(SHARD, huge),
    "a terabyte of nothing as an adapter": instead(TENSORS, huge),
    **{f"a terabyte of nothing as {file}": instead(file, huge) for file in (INDEX, BASE_CONFIG, CONFIG)},
    "a terabyte of nothing as a tokenizer": beside("tokenizer.json", huge),
    "a sound header over half a terabyte": header(SHARD, shaped([1 << 30]), size=1 << 39),
    "an adapter of a terabyte, all of it described": header(
        TENSORS, {A: {"dtype": "U8", "shape": [(1 << 40) - 200], "data_offsets": [0, (1 << 40) - 200]}}, size=1 << 40
    ),
    "65 dimensions": header(SHARD, shaped([1] * 65), bytes(4)),
    "a million dimensions": header(SHARD, shaped([1] * 1_000_000), bytes(4)),
    "a shape of 2^62 by 0": header(SHARD, shaped([1 << 62, 1 << 62, 0], size=0)),
    "a shape beyond 2^63": header(SHARD, shaped([1 << 32, 1 << 32], size=0)),
    "a name of 2000 bytes": header(SHARD, {"n" * 2000: {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]}}),
    "many sites that the base lacks": many_strangers,
    "a million empty tensors": header(SHARD, lambda: empty_tensors(1_000_000)),
    "100 001 empty tensors": header(SHARD, lambda: empty_tensors(100_001)),
    "a header of 17 MiB of spaces": header(SHARD, lambda: b"{" + b" " * (17 << 20) + b"}"),
    "a header of 15 MiB of lists": header(SHARD, lambda: b'{"a":[' + b"[]," * (5 << 20) + b"[]]}"),
    "a header of 15 MiB of notes": header(SHARD, lambda: b'{"__metadata__":{' + b'"a":"",' * (2 << 20) + b"}}"),
    "a header whose last of many is wrong": header(SHARD, lambda: empty_tensors(99_999, b',"a":1')),
    **{f"{what} as {file}": instead(file, text_of(text)) for file in (INDEX, BASE_CONFIG, CONFIG) for what, text in {
        "200 000 nested lists": lambda: deep(200_000),
        "900 nested lists": lambda: deep(900),
        "65 nested lists": lambda: deep(65),
        "a million numbers": lambda: b'{"x": [' + b"1," * 1_000_000 + b"1]}",
        "a million keys": lambda: keys(1_000_000),
        "400 000 keys and the last twice": lambda: keys(400_000, b',"399999":1'),
        "34 MiB of spaces": lambda: b"{" + b" " * (34 << 20) + b"}",
        "9 MiB of wide characters": lambda: b'{"x": "' + "😀".encode() * (9 << 18) + b'"}',
    }.items()},
    "an index of 300 000 tensors": instead(INDEX, text_of(lambda: json.dumps(
        {"weight_map": {f"layers.{i}": SHARDS[i % 2] for i in range(300_000)}}).encode())),
    "an index of 100 000 shards": instead(INDEX, text_of(lambda: json.dumps(
        {"weight_map": {f"layers.{i}": f"{i}.safetensors" for i in range(100_000)}}).encode())),
}  # fmt: skip
LINKS: Damages = {
    **{f"{file} a link out of the folder": out_of(file)
       for file in (SHARD, INDEX, BASE_CONFIG, CONFIG, TENSORS)},
    "a tokenizer that is a link out of the folder": beside("tokenizer.json", link_to("/etc/hostname")),
    "a file of a sub-folder that is a link out": both(
        beside("more", Path.mkdir), beside("more/a.txt", link_to("../../adapter/adapter_config.json"))
    ),
    "a folder that is a link": beside("more", link_to("..")),
    "a link to a home directory": beside("notes.txt", link_to("/root")),
    "a tokenizer of the adapter that is a link out": instead("adapter/tokenizer.json", link_to("/etc/hostname")),
    "a link to /dev/zero": beside("tokenizer.json", link_to("/dev/zero")),
    "a link to /proc/self/environ": beside("tokenizer.json", link_to("/proc/self/environ")),
    **{f"{file} a link to /dev/zero": instead(file, link_to("/dev/zero"))
       for file in (SHARD, INDEX, BASE_CONFIG, CONFIG, TENSORS)},
    **{f"{file} a socket": instead(file, a_socket) for file in (SHARD, INDEX, BASE_CONFIG, CONFIG, TENSORS)},
    "a pipe beside the weights": beside("vocab.json", os.mkfifo),
    "a socket beside the weights": beside("vocab.json", a_socket),
    "a pipe for a tokenizer of the adapter": instead("adapter/tokenizer.json", os.mkfifo),
    "a link in a false snapshot": both(
        beside("snapshots", Path.mkdir), beside("snapshots/x", link_to("../../adapter/adapter_config.json"))
    ),
}  # fmt: skip
