"""Where a model or adapter lies: an existing path, or `owner/name[@revision]` on the Hugging Face Hub."""

import os
import re
from os import PathLike
from pathlib import Path

from surgery.errors import EnvironmentFault, InputError, printable

_HUB_ID = re.compile(r"(?P<id>\w[\w.-]*/\w[\w.-]*)(?:@(?P<revision>[\w./-]+))?")
_WANTED = ["*.safetensors", "*.json", "*.txt", "*.model", "*.jinja", "*.py", "tokenizer*"]


def locate(spec: str | PathLike[str]) -> Path:
    """The path that `spec` names, after a download where it is a Hub id.

    InputError if it is neither; EnvironmentFault if the Hub cannot be reached and its cache lacks the files.
    """
    path = Path(spec).expanduser()
    if os.path.exists(path):  # noqa: PTH110  # unlike Path.exists, false for a name too long to be one
        return path
    found = _HUB_ID.fullmatch(str(spec))
    if found is None:
        raise InputError(f"{printable(spec)}: no such file or folder; a path or owner/name[@revision] is wanted")
    return _download(found["id"], found["revision"])


def _download(hub_id: str, revision: str | None) -> Path:
    import huggingface_hub
    from huggingface_hub import errors

    name = hub_id if revision is None else f"{hub_id}@{revision}"
    try:
        return Path(huggingface_hub.snapshot_download(hub_id, revision=revision, allow_patterns=_WANTED))
    except errors.LocalEntryNotFoundError as error:
        raise EnvironmentFault(
            f"{name}: not a path, not in the Hub's cache, and the Hub cannot be reached; check name and network"
        ) from error
    except (errors.HfHubHTTPError, errors.HFValidationError) as error:
        raise InputError(
            f"{name}: the Hub refuses it ({type(error).__name__}); check the name and your login"
        ) from error
    except OSError as error:
        raise EnvironmentFault(
            f"{name}: the download failed ({type(error).__name__}); check network and disk"
        ) from error
