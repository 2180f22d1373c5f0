"""Damages: what can befall the files of a base or of an adapter, each a function of the folder that holds both."""

import json
import os
import pickle
import shutil
import struct
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

Damage = Callable[[Path], object]
Damages = dict[str, Damage]

SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
INDEX, BASE_CONFIG, SHARD = "base/model.safetensors.index.json", "base/config.json", f"base/{SHARDS[1]}"
CONFIG, TENSORS = "adapter/adapter_config.json", "adapter/adapter_model.safetensors"
LACKING = type("Lacking", (), {"__repr__": lambda _: "lacking"})()

NO_JSON = {
    "empty": b"",
    "a list": b"[]",
    "null": b"null",
    "cut": b'{"peft_type": "LORA", "r',
    "with a key twice": b'{"weight_map": {}, "weight_map": {}}',
    "with an inner key twice": b'{"x": {"y": 1, "y": 1}}',
    "not UTF-8": b'{"x": "\xff"}',
    "with half a surrogate pair": b'{"x": "\\ud800"}',
    "deep": b'{"x": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    "with a number of 5000 digits": b'{"x": ' + b"1" * 5000 + b"}",
    "a pickle": pickle.dumps({}),
}


class Bomb:
    """Makes a folder where it is unpickled."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple[Callable, tuple[str]]:
        return os.mkdir, (str(self.folder / "exploded"),)


def write(path: Path, value: object) -> None:
    path.write_text(json.dumps(value))


def in_json(file: str, *keys: str, value: object) -> Damage:
    """Another value at the place that `keys` lead to; nothing there, if LACKING."""

    def damage(folder: Path) -> None:
        whole = place = json.loads((folder / file).read_text())
        for key in keys[:-1]:
            place = place[key]
        place[keys[-1]] = value
        if value is LACKING:
            del place[keys[-1]]
        write(folder / file, whole)

    return damage


def no_json(file: str) -> Damages:
    """The file spells no object, or not one that is safe to carry."""

    def spelled(data: bytes) -> Damage:
        return lambda folder: (folder / file).write_bytes(data)

    return {f"{file} {what}": spelled(data) for what, data in NO_JSON.items()}


def no_file(file: str) -> Damages:
    """Something else lies where the file should."""

    def instead(make: Callable[[Path], object]) -> Damage:
        return lambda folder: ((folder / file).unlink(), make(folder / file))

    return {
        f"{file} a folder": instead(Path.mkdir),
        f"{file} a pipe": instead(os.mkfifo),
        f"{file} a link to nothing": instead(lambda path: path.symlink_to("nothing")),
        f"{file} a link to itself": instead(lambda path: path.symlink_to(path)),
        f"{file} a pickle bomb": instead(lambda path: path.write_bytes(pickle.dumps(Bomb(path.parent.parent)))),
    }


def lacking(file: str) -> Damages:
    return {f"{file} lacking": lambda folder: (folder / file).unlink()}


def no_tensors(file: str) -> Damages:
    """The file is cut, too long, or its header contradicts itself."""

    def changed(change: Callable[[bytes], bytes]) -> Damage:
        return lambda folder: (folder / file).write_bytes(change((folder / file).read_bytes()))

    changes = {f"cut at {share}": lambda data, share=share: data[: int(len(data) * share)] for share in (0, 0.1, 0.6)}
    changes |= {
        "cut by a byte": lambda data: data[:-1],
        "longer by a byte": lambda data: data + b"\0",
        "with a field twice": lambda data: data.replace(b'"shape"', b'"dtype"', 1),
        "with a dtype that is none": lambda data: data.replace(b'"F32"', b'"F33"', 1),
        "with a length beyond its end": lambda data: b"\xff" * 7 + data[7:],
        "with a negative offset": lambda data: data.replace(b'"data_offsets":[0,', b'"data_offsets":[-,', 1),
        "with an overlap": _overlapping,
    }
    return {f"{file} {what}": changed(change) for what, change in changes.items()}


def _overlapping(data: bytes) -> bytes:
    """The last tensor's bytes are said to begin with the file's first."""
    end = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:end])
    last = max((one for one in header.values() if "shape" in one), key=lambda one: one["data_offsets"])
    last["data_offsets"] = [0, last["data_offsets"][1] - last["data_offsets"][0]]
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data[end:]


def one_tensor_twice(folder: Path) -> None:
    first, second = (folder / "base" / shard for shard in SHARDS)
    save_file(load_file(second) | {"0.bias": load_file(first)["0.bias"]}, second)


def one_tensor_twice_told_of_the_second(folder: Path) -> None:
    one_tensor_twice(folder)
    in_json(INDEX, "weight_map", "0.bias", value=SHARDS[1])(folder)


def one_tensor_not_in_the_index(folder: Path) -> None:
    save_file(load_file(folder / SHARD) | {"1.more": torch.zeros(1)}, folder / SHARD)


def one_shard_outside(folder: Path, told: str = "../outside.safetensors") -> None:
    """The shard is there, and sound; but the index leads out of the folder."""
    (folder / SHARD).rename(folder / "outside.safetensors")
    for name in ("1.weight", "1.bias"):
        in_json(INDEX, "weight_map", name, value=told)(folder)


def one_shard_at_an_absolute_path(folder: Path) -> None:
    one_shard_outside(folder, str(folder / "outside.safetensors"))


def no_base(folder: Path) -> None:
    shutil.rmtree(folder / "base")


def an_empty_base(folder: Path) -> None:
    no_base(folder)
    (folder / "base").mkdir()


def a_base_in_a_pickle(folder: Path) -> None:
    an_empty_base(folder)
    (folder / "base" / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb(folder)))


def a_base_that_is_a_pickle(folder: Path) -> None:
    no_base(folder)
    (folder / "base").write_bytes(pickle.dumps(Bomb(folder)))


def no_adapter(folder: Path) -> None:
    shutil.rmtree(folder / "adapter")


def an_adapter_in_a_pickle(folder: Path) -> None:
    (folder / TENSORS).unlink()
    (folder / "adapter" / "adapter_model.bin").write_bytes(pickle.dumps(Bomb(folder)))
