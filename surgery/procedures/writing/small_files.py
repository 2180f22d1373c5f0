"""The small files beside a checkpoint's weights: which a merge carries, and which it leaves out."""

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from surgery.errors import InputError, printable
from surgery.hosts.checkpoint import Checkpoint
from surgery.io.regular import contained, open_regular
from surgery.io.weight_files import INDEX

RECEIPT = "surgery.receipt.json"
CARD = "README.md"  # for people: a push writes another
CARRIED_BYTES = 1 << 30  # of one file

# Weights in other formats, which a merge would leave stale.
_STALE = frozenset({".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".ot", ".gguf", ".onnx"})
_STALE_FOLDERS = frozenset({"onnx", "openvino", "coreml", "surgery.undo"})

# What an adapter folder brings, and what then wins over the base's.
_TOKENIZER = (
    "tokenizer",
    "vocab",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template",
)


@dataclass
class SmallFiles:
    """What stands beside the weights of an output, by name: a file to copy, or the bytes themselves."""

    contents: dict[str, Path | bytes] = field(default_factory=dict)
    originals: list[str] = field(default_factory=list)  # the base's own names
    displaced: list[str] = field(default_factory=list)  # of these, those whose bytes are others now, or gone
    left_out: list[str] = field(default_factory=list)
    sha256: dict[str, str] = field(default_factory=dict)  # of what was written

    @property
    def size(self) -> int:
        """In bytes."""
        return sum(len(one) if isinstance(one, bytes) else one.stat().st_size for one in self.contents.values())

    def put(self, name: str, content: Path | bytes | None) -> None:
        """Let `name` be this content, or nothing."""
        before = self.contents.pop(name, None)
        if content is not None:
            self.contents[name] = content
        same = isinstance(content, bytes) and isinstance(before, Path) and before.read_bytes() == content
        if name in self.originals and name not in self.displaced and not same:
            self.displaced.append(name)


def small_files(base: Checkpoint, adapters: Sequence[Path]) -> SmallFiles:
    """What stands beside the weights of `base`, overlaid by the tokenizers of `adapters`."""
    files = _beside(base)
    for folder in adapters:
        for path in sorted(folder.iterdir()) if folder.is_dir() else []:
            if path.name.startswith(_TOKENIZER) and path.suffix not in _STALE and not path.is_dir():
                files.put(path.name, _carried(folder, path))
    return files


def _beside(base: Checkpoint) -> SmallFiles:
    if not base.path.is_dir():
        config = base.folder / "config.json"
        if not os.path.lexists(config):
            return SmallFiles()
        return SmallFiles({"config.json": _carried(base.folder, config)}, ["config.json"])
    weights = {file.path.name for file in base.files}
    files = SmallFiles()
    for path in sorted(base.folder.rglob("*")):
        name = path.relative_to(base.folder)
        if path.is_symlink() and not path.exists():
            raise InputError(f"{printable(path)}: a link to nothing; was the model downloaded whole?")
        folder = path.is_dir() and not path.is_symlink()
        if folder or any(part.startswith(".") for part in name.parts) or str(name) in weights:
            continue
        if _stale(name, base):
            files.left_out.append(name.as_posix())
        else:
            files.contents[name.as_posix()] = _carried(base.folder, path)
    files.originals = list(files.contents)
    return files


def _carried(folder: Path, path: Path) -> Path:
    """`path`, if it is a regular file of the folder, and no larger than what stands beside weights."""
    contained(folder, path.relative_to(folder))
    with open_regular(path, "a file to carry") as file:
        size = os.fstat(file.fileno()).st_size
    if size > CARRIED_BYTES:
        raise InputError(f"{printable(path)}: {size} bytes; files of up to {CARRIED_BYTES} are carried; move it away")
    return path


def _stale(name: Path, base: Checkpoint) -> bool:
    """Would it tell of other weights than those that are written?"""
    if name.as_posix() == INDEX:
        return base.index is None
    stale = name.suffix in _STALE or name.parts[0] in _STALE_FOLDERS or name.as_posix() == RECEIPT
    return stale or name.name.endswith((".bin.index.json", ".onnx.data", ".onnx_data", ".onnx_adapter"))
