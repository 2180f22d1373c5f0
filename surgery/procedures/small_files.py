"""The small files beside a checkpoint's weights: which a merge carries, and which it leaves out."""

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from surgery.errors import InputError, printable
from surgery.hosts.checkpoint import INDEX, Checkpoint
from surgery.io.regular import contained, open_regular
from surgery.io.strict_json import json_bytes

RECEIPT = "surgery.receipt.json"
CARRIED_BYTES = 1 << 30  # of one file

# Weights in other formats, which a merge would leave stale.
_STALE = frozenset({".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".ot", ".gguf", ".onnx"})
_STALE_FOLDERS = frozenset({"onnx", "openvino", "coreml", "surgery.undo"})
_STALE_NAMES = frozenset({RECEIPT, INDEX})

# What an adapter folder brings, and what then wins over the base's.
_TOKENIZER = (
    "tokenizer",
    "vocab",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template",
)


class SmallFiles(NamedTuple):
    """By name within the output: where each carried file lies; and the names of those left out."""

    carried: dict[str, Path]
    left_out: list[str]
    displaced: list[str]  # the base's, where the adapter's own takes its place
    added: list[str]  # the adapter's, where the base has none


def small_files(base: Checkpoint, adapters: Sequence[Path]) -> SmallFiles:
    """What stands beside the weights of `base`, overlaid by the tokenizers of `adapters`."""
    found, left_out = _beside(base)
    displaced: list[str] = []
    added: list[str] = []
    for folder in adapters:
        for path in sorted(folder.iterdir()) if folder.is_dir() else []:
            if path.name.startswith(_TOKENIZER) and not path.is_dir():
                (displaced if path.name in found else added).append(path.name)
                found[path.name] = _carried(folder, path)
    return SmallFiles(found, left_out, displaced, added)


def true_config(base: Checkpoint, dtype: torch.dtype | None) -> bytes | None:
    """config.json with the dtype that the weights have now; None where nothing changes."""
    if dtype is None or not base.config:
        return None
    name = str(dtype).removeprefix("torch.")
    data = _with_dtype(base.config, name)
    if isinstance(data.get("text_config"), dict):
        data["text_config"] = _with_dtype(data["text_config"], name)
    return json_bytes(data) if data != base.config else None


def file_sha256(path: Path) -> str:
    """sha256 of a file's bytes."""
    with open_regular(path, "a file") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _beside(base: Checkpoint) -> tuple[dict[str, Path], list[str]]:
    if not base.path.is_dir():
        config = base.folder / "config.json"
        return ({"config.json": _carried(base.folder, config)} if os.path.lexists(config) else {}), []
    weights = {file.path.name for file in base.files}
    found, left_out = {}, []
    for path in sorted(base.folder.rglob("*")):
        name = path.relative_to(base.folder)
        if path.is_symlink() and not path.exists():
            raise InputError(f"{printable(path)}: a link to nothing; was the model downloaded whole?")
        if (
            (path.is_dir() and not path.is_symlink())
            or any(part.startswith(".") for part in name.parts)
            or str(name) in weights
        ):
            continue
        stale = path.suffix in _STALE or name.parts[0] in _STALE_FOLDERS or name.as_posix() in _STALE_NAMES
        stale = stale or path.name.endswith(".bin.index.json")
        if not stale:
            found[name.as_posix()] = _carried(base.folder, path)
        elif name.as_posix() != INDEX:
            left_out.append(name.as_posix())
    return found, left_out


def _carried(folder: Path, path: Path) -> Path:
    """`path`, if it is a regular file of the folder, and no larger than what stands beside weights."""
    contained(folder, path.relative_to(folder))
    with open_regular(path, "a file to carry") as file:
        size = os.fstat(file.fileno()).st_size
    if size > CARRIED_BYTES:
        raise InputError(f"{printable(path)}: {size} bytes; files of up to {CARRIED_BYTES} are carried; move it away")
    return path


def _with_dtype(config: dict[str, Any], name: str) -> dict[str, Any]:
    told = [key for key in ("dtype", "torch_dtype") if key in config] or ["dtype"]
    return {**config, **dict.fromkeys(told, name)}
