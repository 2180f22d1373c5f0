"""Where a model or adapter lies: an existing path, or `owner/name[@revision]` on the Hugging Face Hub."""

import os
import re
from os import PathLike
from pathlib import Path
from typing import NamedTuple

from surgery.errors import AbsentError, EnvironmentFault, UsageError, printable
from surgery.io.regular import contained
from surgery.io.snapshot import snapshot

_HUB_ID = re.compile(r"(?P<id>\w[\w.-]*/\w[\w.-]*)(?:@(?P<revision>(?!.*\.\.)\w[\w./-]*))?", re.ASCII)


_URL = re.compile(  # of a model's page, or a file of it
    r"(?:hf://|(?:https?://)?(?:www\.)?(?:huggingface|hf)\.co/)"
    r"(?!(?:datasets|spaces|docs|papers|collections|blog)/)"
    r"(?P<id>\w[\w.-]*/\w[\w.-]*?)(?:\.git)?(?:@(?P<at>[\w./-]+)|/(?:tree|blob|resolve)/(?P<revision>[\w.-]+))?(?:[/?#].*)?",
    re.ASCII,
)


class Located(NamedTuple):
    """Where something lies; and, if it came from the Hub, of which repository and commit."""

    path: Path
    hub_id: str | None = None
    commit: str | None = None


def local_path(where: str | PathLike[str]) -> Path:
    """A path on this machine; `~` is a home folder, where it is that of a user who is known."""
    return Path(os.path.expanduser(where))  # noqa: PTH111  # that of pathlib raises for another


def locate(spec: str | PathLike[str]) -> Path:
    """The path that `spec` names, after a download where it is a Hub id; errors as `located`."""
    return located(spec).path


def located(spec: str | PathLike[str], revision: str | None = None, subfolder: str | None = None) -> Located:
    """The path that `spec` names, after a download where it is a Hub id, and the commit it came from.

    `revision` may stand apart from the id; in a local path it says nothing. `subfolder` is of the folder.

    AbsentError if it is neither a path nor an id; InputError if the Hub refuses it or gives other bytes than it lists;
    EnvironmentFault if the Hub cannot be reached and its cache lacks the files.
    """
    path = local_path(spec)
    if os.path.exists(path):  # noqa: PTH110  # unlike Path.exists, false for a name too long to be one
        return Located(_inside(path, subfolder))
    found = _HUB_ID.fullmatch(str(spec))
    if found is None:
        raise AbsentError(f"{printable(spec)}: {_wanted(str(spec))}")
    if revision and found["revision"] not in (None, revision):
        raise UsageError(f"{printable(spec)}: revision is {printable(revision)} too; one is wanted")
    try:
        folder, commit = snapshot(found["id"], revision or found["revision"], subfolder or "")
    except EnvironmentFault as error:
        if path.parent.is_dir():  # a folder here, so that no id was meant, or one that cannot be asked for
            where = printable(path.parent)
            raise AbsentError(f"{printable(spec)}: no such file or folder in {where}; else, {error}") from error
        raise
    return Located(_inside(folder, subfolder), found["id"], commit)


def _wanted(spec: str) -> str:
    """What to name in place of what is neither a path nor an id."""
    url = _URL.fullmatch(spec)
    if url is None:
        return "no such file or folder; a path or owner/name[@revision] is wanted"
    revision = url["at"] or url["revision"]
    return f"an address; a path or owner/name[@revision] is wanted, here {url['id']}{f'@{revision}' * bool(revision)}"


def _inside(folder: Path, subfolder: str | None) -> Path:
    """InputError for a sub-folder that leads out, AbsentError for one that is not there."""
    if not subfolder:
        return folder
    path = contained(folder, subfolder)
    if not path.is_dir():
        raise AbsentError(f"{printable(folder)}: no folder {printable(subfolder)} in it; check subfolder")
    return path
