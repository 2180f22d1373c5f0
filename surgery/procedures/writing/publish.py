"""Publish: a merged folder as one commit of a Hub repository, with a model card, and what the Hub then states of it."""

import hashlib
import re
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from surgery.core.report import Report
from surgery.errors import CheckError, EnvironmentFault, InputError, SurgeryError, UsageError, printable
from surgery.io.hub_files import HubFile
from surgery.io.patience import Patience
from surgery.io.regular import file_sha256
from surgery.io.snapshot import listing
from surgery.procedures.writing.model_card import front_matter, model_card
from surgery.procedures.writing.receipt import read_receipt
from surgery.procedures.writing.small_files import CARD, RECEIPT
from surgery.procedures.writing.undo_record import FOLDER as UNDO

_HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*", re.ASCII)
_WEIGHTS = (".safetensors", ".safetensors.index.json", ".bin", ".bin.index.json", ".h5", ".msgpack", ".pt", ".pth")


@dataclass(frozen=True, repr=False)
class PushReport(Report):
    """What was uploaded, in which commit: `files` has the sha256 of each, which the Hub states too."""

    hub_id: str
    commit: str
    files: Mapping[str, str]

    def summary(self) -> str:
        """One line."""
        return f"{self.hub_id}@{self.commit}: {len(self.files)} files, each as the Hub states it"

    def to_json(self) -> dict[str, Any]:
        return {"hub_id": self.hub_id, "commit": self.commit, "files": dict(self.files)}


def check_hub_id(hub_id: str) -> None:
    """UsageError unless it can name a repository."""
    if not _HUB_ID.fullmatch(hub_id) or "--" in hub_id or ".." in hub_id or hub_id.endswith((".git", ".ipynb")):
        raise UsageError(f"{printable(hub_id)}: no name of a Hub repository; owner/name is wanted")


def push_to_hub(out: Path, hub_id: str, *, private: bool = False) -> PushReport:
    """Upload the merge in `out` as one commit; the repository is made if there is none. `out` stays as it is.

    README.md in the upload is the model card; the base's own is kept for unmerge, where the merge is reversible.
    InputError for what the Hub refuses, or if the repository holds other weights, which loaders might take
    instead; CheckError if `out` is not what its receipt says; EnvironmentFault if the Hub cannot be reached, or
    states other hashes afterwards.
    """
    from huggingface_hub import CommitOperationAdd, HfApi

    check_hub_id(hub_id)
    if not (out / RECEIPT).is_file():
        raise InputError(f"{printable(out)}: no {RECEIPT} in it; a folder that `surgery merge` wrote is wanted")
    receipt = read_receipt(out)
    files = {path.relative_to(out).as_posix(): path for path in _files(out)}
    if CARD in files:
        displaced = files.pop(CARD)
        files |= {f"{UNDO}/files/{CARD}": displaced} if (out / UNDO).is_dir() else {}  # unmerge gives it back
    additions = [CommitOperationAdd(name, str(path)) for name, path in files.items()]
    additions.append(CommitOperationAdd(CARD, _card(out, receipt, hub_id).encode()))
    _refuse_changed(out, receipt, additions)
    api, patience = HfApi(), Patience(hub_id)
    patience.run(lambda: api.create_repo(hub_id, private=private, exist_ok=True))
    _refuse_others(patience, hub_id, {one.path_in_repo for one in additions}, private)
    with _bars_on_terminals_only():
        made = patience.run(lambda: api.create_commit(hub_id, additions, commit_message="Merge made by surgery"))
    commit = str(made.oid)
    _compare(patience, hub_id, commit, additions)
    return PushReport(hub_id, commit, {one.path_in_repo: one.upload_info.sha256.hex() for one in additions})


def push_merged(out: Path, hub_id: str, *, private: bool) -> PushReport:
    """`push_to_hub` right after a merge, whose errors say that the merge itself is done."""
    try:
        return push_to_hub(out, hub_id, private=private)
    except SurgeryError as error:
        told = f"{error}; {printable(out)} is merged and stays; `surgery push` uploads it"
        raise type(error)(told) from error


def _files(out: Path) -> list[Path]:
    found = [path for path in sorted(out.rglob("*")) if not path.is_dir()]
    for path in found:
        if path.is_symlink() or not path.is_file():
            raise InputError(f"{printable(path)}: no regular file; a merge writes none; take it away")
    return found


def _card(out: Path, receipt: Mapping[str, Any], hub_id: str) -> str:
    card = out / CARD
    stated = front_matter(card.read_text(encoding="utf-8", errors="replace")) if card.is_file() else {}
    return model_card(receipt, file_sha256(out / RECEIPT), stated, hub_id)


def _refuse_changed(out: Path, receipt: Mapping[str, Any], additions: list[Any]) -> None:
    found = {one.path_in_repo: one for one in additions}
    for name, digest in receipt["files"].items():
        if name not in found or found[name].upload_info.sha256.hex() != digest:
            raise CheckError(f"{printable(out / name)}: not what the receipt says; merge it anew, and push that")


def _refuse_others(patience: Patience, hub_id: str, ours: set[str], private: bool) -> None:
    """Weights of another model beside ours: which of them a loader takes depends on the loader."""
    from huggingface_hub import HfApi

    info = patience.run(lambda: HfApi().model_info(hub_id))
    if private and info.private is False:
        raise InputError(f"{hub_id}: it exists and is public; make it private on the Hub, or name another")
    there = {one.rfilename for one in info.siblings or ()}
    if others := sorted(name for name in there - ours if "/" not in name and name.endswith(_WEIGHTS)):
        raise InputError(
            f"{hub_id}: it holds {printable(others[0])}, which this push would leave beside its own weights; "
            "delete it there, or name another repository"
        )


@contextmanager
def _bars_on_terminals_only() -> Iterator[None]:
    """The library draws the bars of uploads into pipes too."""
    from huggingface_hub.utils.tqdm import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    if sys.stderr.isatty() or are_progress_bars_disabled():
        yield
        return
    disable_progress_bars()
    try:
        yield
    finally:
        enable_progress_bars()


def _compare(patience: Patience, hub_id: str, commit: str, additions: list[Any]) -> None:
    """EnvironmentFault unless the Hub has each file, with our hash."""
    _, files = patience.run(lambda: listing(hub_id, commit, hub_id))
    there = {file.name: file for file in files}
    for one in additions:
        file = there.get(one.path_in_repo)
        if file is None or not _same(file, one):
            found = "not there" if file is None else "there with another hash"
            where = f"{hub_id}@{commit}: {printable(one.path_in_repo)}"
            raise EnvironmentFault(f"{where} is {found} after the upload; the folder stays; push again")


def _same(file: HubFile, addition: Any) -> bool:
    if file.sha256 is not None:
        return bool(file.sha256 == addition.upload_info.sha256.hex())
    with addition.as_file() as content:
        data = content.read()
    return hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest() == file.blob_id
