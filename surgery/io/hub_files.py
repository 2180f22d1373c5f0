"""The files of a Hub repository: what its listing says of each, and which of them are needed."""

import hashlib
import re
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import NamedTuple

from surgery.errors import AbsentError, FormatError, InputError, printable
from surgery.io.weight_files import INDEX, SINGLE

ADAPTER, ADAPTER_CONFIG = "adapter_model.safetensors", "adapter_config.json"

_TOKENIZER = ("tokenizer*", "vocab*", "merges.txt", "special_tokens_map.json", "added_tokens.json", "chat_template*")
_SMALL = (*_TOKENIZER, "*.json", "*.txt", "*.model", "*.jinja", "*.py", "*.md", "*.tiktoken", "*.spm")
_LEGAL = ("LICENSE*", "LICENCE*", "NOTICE*")
_RECORDS = "surgery.undo/"  # what unmerge needs
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".h5", ".msgpack", ".ot", ".gguf", ".onnx", ".safetensors")
_OTHER_FORMATS = frozenset({"onnx", "openvino", "coreml"})
_UNSAFE = re.compile(r"[\x00-\x1f\x7f\\:\ud800-\udfff]")  # a colon is a drive on Windows
_SHA256, _SHA1 = re.compile(r"[0-9a-f]{64}"), re.compile(r"[0-9a-f]{40}")


class HubFile(NamedTuple):
    """One line of a listing. `sha256` is of the content, for files in LFS; `blob_id` is git's, for the others."""

    name: str
    size: int
    sha256: str | None
    blob_id: str

    def is_content_of(self, path: Path) -> bool:
        """Whether the bytes at `path` are those that the Hub states; reads all of them."""
        with path.open("rb") as file:
            if self.sha256 is not None:
                return hashlib.file_digest(file, "sha256").hexdigest() == self.sha256
            digest = hashlib.sha1(b"blob %d\0" % path.stat().st_size, usedforsecurity=False)
            while chunk := file.read(1 << 20):
                digest.update(chunk)
            return digest.hexdigest() == self.blob_id


def hub_file(name: object, size: object, sha256: object, blob_id: object, where: str = "") -> HubFile:
    """A line of a listing, whatever the Hub has sent. FormatError unless it states all that is needed."""
    sound = isinstance(name, str) and isinstance(size, int) and size >= 0
    sound = sound and (sha256 is None or (isinstance(sha256, str) and _SHA256.fullmatch(sha256) is not None))
    if not sound or not isinstance(blob_id, str) or _SHA1.fullmatch(blob_id) is None:
        raise FormatError(
            f"{where}: {printable(name)}: the listing states no size and hash of it; both are wanted; check HF_ENDPOINT"
        )
    return HubFile(str(name), int(str(size)), None if sha256 is None else str(sha256), blob_id)


def needed_at_first(files: Sequence[HubFile], where: str) -> list[HubFile]:
    """All but the weights: small files of a model, or config and tokenizer of an adapter.

    InputError if one is listed twice, or by a name that could lead out of the folder.
    """
    names = {file.name for file in files}
    wanted = (ADAPTER_CONFIG, *_TOKENIZER) if is_adapter(names) else (*_SMALL, *_LEGAL)
    found = [file for file in files if _is_small(file.name, wanted)]
    _refuse_names([*(file.name for file in found), *(name for name in names if name.endswith(".safetensors"))], where)
    for name, times in Counter(file.name for file in files).items():
        if times > 1:
            raise InputError(f"{where}: {printable(name)} is listed twice; each file may stand once; do not use it")
    return found


def needed_weights(files: Sequence[HubFile], shards: Collection[str], where: str) -> list[HubFile]:
    """The weights, in safetensors only; `shards` are those that the index names.

    InputError if there is none, or if a shard is not listed.
    """
    by_name = {file.name: file for file in files}
    found = [by_name[ADAPTER]] if ADAPTER_CONFIG in by_name and ADAPTER in by_name else []
    if is_adapter(by_name):
        return found or _refuse(by_name, f"no {ADAPTER}", where)
    if missing := sorted(set(shards) - by_name.keys()):
        raise InputError(
            f"{where}: its index names {printable(missing[0])}, which is not there; was it uploaded whole?"
        )
    if INDEX in by_name:
        return found + [by_name[name] for name in sorted(shards)]
    others = [name for name in sorted(by_name) if name.endswith(".safetensors") and "/" not in name]
    alone = [SINGLE] if SINGLE in by_name else others
    if len(alone) > 1:
        raise InputError(f"{where}: {len(alone)} safetensors files and no {INDEX}; download one and give its path")
    return found + [by_name[name] for name in alone] or _refuse(by_name, "no safetensors file", where)


def is_adapter(names: Collection[str]) -> bool:
    """Whether a repository holds an adapter and no model."""
    return ADAPTER_CONFIG in names and SINGLE not in names and INDEX not in names


def is_commit(text: object) -> bool:
    """Whether `text` is a commit's sha, in full."""
    return isinstance(text, str) and _SHA1.fullmatch(text) is not None


def _is_small(name: str, wanted: Sequence[str]) -> bool:
    *folders, last = name.split("/")
    if name.startswith(_RECORDS):
        return ADAPTER_CONFIG not in wanted and not name.endswith(_PICKLES)
    if folders and ADAPTER_CONFIG in wanted:
        return False
    if name.endswith(_PICKLES) or (last.endswith(".index.json") and name != INDEX):
        return False
    hidden = any(part.startswith(".") and not part.startswith("..") for part in (*folders, last))
    if hidden or _OTHER_FORMATS & set(folders):
        return False
    return any(fnmatchcase(last, pattern) for pattern in wanted)


def _refuse_names(names: Sequence[str], where: str) -> None:
    for name in names:
        parts = name.split("/")
        if _UNSAFE.search(name) or any(part in ("", ".", "..") for part in parts) or len(name.encode()) > 1024:
            raise InputError(f"{where}: it lists {printable(name)!r}; a plain relative name is wanted; do not use it")


def _refuse(names: Collection[str], found: str, where: str) -> list[HubFile]:
    others = sorted(name for name in names if "/" not in name and name.endswith(_PICKLES[:-1]))
    if not others:
        raise AbsentError(f"{where}: {found} in it; check the name")
    raise InputError(
        f"{where}: {found}, only {printable(others[0])}; pickles can run code when they are read, and other formats "
        "are not read; save it as safetensors first"
    )


def shard_names(weight_map: object) -> Iterator[str]:
    """The files that an index names; what is no plain name of one is left to the reader of the checkpoint."""
    named = weight_map.values() if isinstance(weight_map, dict) else ()
    for name in dict.fromkeys(one for one in named if isinstance(one, str)):
        if name.endswith(".safetensors") and "/" not in name:
            yield name
