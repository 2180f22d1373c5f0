"""One repository in the Hub's cache, laid out as huggingface_hub does: blobs, refs, and a folder of links a commit.

Beside them `surgery/COMMIT.json` keeps which files are needed of a commit and what the Hub stated of them, so
that without a network a download that was cut off is told from a whole one; and which of them were to be fetched
and are not yet checked, so that a run that was killed between the two leaves nothing unchecked.
"""

import errno
import json
import os
from collections.abc import Collection, Sequence
from hashlib import sha256
from pathlib import Path
from typing import NamedTuple

from surgery.errors import InputError
from surgery.io.hub_files import HubFile, hub_file, is_commit
from surgery.io.strict_json import read_json

RECHECKED_BYTES = 1 << 24  # what is cached and not larger is hashed each time; larger files only when they come


class CachedRepository:
    """Reads and completes what lies in the cache of one repository, or of one folder in it."""

    def __init__(self, hub_id: str, subfolder: str = "") -> None:
        from huggingface_hub import constants

        self.subfolder = subfolder.strip("/")

        self.cache = Path(constants.HF_HUB_CACHE).expanduser().resolve()
        self.root = self.cache / f"models--{hub_id.replace('/', '--')}"

    def folder(self, commit: str) -> Path:
        return self.root / "snapshots" / commit

    def commit_of(self, revision: str) -> str | None:
        """The commit that `revision` was when it was last read."""
        if is_commit(revision):
            return revision
        try:
            commit = (self.root / "refs" / revision).read_text().strip()
        except (OSError, ValueError):
            return None
        return commit if is_commit(commit) else None

    def keep_ref(self, revision: str, commit: str) -> None:
        if not is_commit(revision):
            _write(self.root / "refs" / revision, commit)

    def keep(self, commit: str, needed: Sequence[HubFile] | None, unchecked: Sequence[str] = ()) -> None:
        """Write which files are needed, None while that is not known; and which are still to be checked."""
        _write(self._record(commit), json.dumps({"needed": needed, "unchecked": unchecked}))

    def state(self, commit: str) -> "State":
        """What the cache holds of a commit."""
        if not self.folder(commit).is_dir():
            return State(False, False, "not in the Hub's cache")
        if not self._record(commit).exists():  # downloaded by another tool, which kept no list
            weights = any(path.exists() for path in (self.folder(commit) / self.subfolder).glob("*.safetensors"))
            return State(weights, False, "in the Hub's cache without a safetensors file")
        try:
            needed = [hub_file(*one) for one in read_json(self._record(commit))["needed"]]
        except (InputError, KeyError, TypeError):
            return State(False, True, "in the Hub's cache in part")
        for file in needed:
            if not self.holds(commit, file):
                return State(False, True, f"in the Hub's cache without a sound {file.name}")
        return State(True, True, "")

    def holds(self, commit: str, file: HubFile) -> bool:
        """Whether a file is there, of the size stated; and if it is small or unchecked, with the bytes stated."""
        path = self.folder(commit) / file.name
        if not path.is_file() or path.stat().st_size != file.size:
            return False
        trusted = file.size > RECHECKED_BYTES and file.name not in self._unchecked(commit)
        return trusted or file.is_content_of(path)

    def discard(self, commit: str, name: str) -> None:
        """Remove a file: the link of this commit, and the blob it leads to."""
        path = self.folder(commit) / name
        while path.is_symlink() and path.is_relative_to(self.cache):
            target = Path(os.path.normpath(path.parent / path.readlink()))
            path.unlink()
            path = target
        if path.is_relative_to(self.cache):
            path.unlink(missing_ok=True)

    def _unchecked(self, commit: str) -> Collection[str]:
        try:
            found = read_json(self._record(commit))["unchecked"]
        except (InputError, KeyError):
            return ()
        return found if isinstance(found, list) else ()

    def _record(self, commit: str) -> Path:
        name = f"{commit}-{sha256(self.subfolder.encode()).hexdigest()[:16]}" if self.subfolder else commit
        return self.root / "surgery" / f"{name}.json"


class State(NamedTuple):
    """Whether a commit can be read from the cache, whether that is known by a list of ours, and if not why."""

    whole: bool
    listed: bool
    found: str


def _write(path: Path, text: str) -> None:
    """In one step: other processes read the cache. A cache that is for reading only stays as it is."""
    try:
        if path.is_file() and path.read_text() == text:
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f"{path.name}.{os.getpid()}.tmp")
        partial.write_text(text)
        partial.replace(path)
    except OSError as error:
        if error.errno not in (errno.EROFS, errno.EACCES, errno.EPERM):
            raise
