"""What quantization_aware says: how the weights of layers will be held."""

import os
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

from torch import nn

from surgery.api.given import checkpoint
from surgery.codecs.formats import format_of
from surgery.errors import UsageError
from surgery.hosts.checkpoint import Checkpoint
from surgery.hosts.holding import Awareness, holding_of
from surgery.hosts.kept_files import KeptFiles
from surgery.procedures.planning.treatment import HELD_IN, LIVE_FORMS, UNMADE

KEEP = "keep"
_OPTION = "quantization_aware"


@contextmanager
def held_as(asked: str | None, root: nn.Module) -> Iterator[Awareness | None]:
    """By layer; None where nothing is asked for. Files that `root` was loaded from are open meanwhile."""
    if asked is None:
        yield None
    elif asked != KEEP:
        yield partial(holding_of, format_of(asked, _OPTION))
        if asked not in LIVE_FORMS:
            _tell(asked)
    else:
        with ExitStack() as stack:
            files = KeptFiles(lambda: stack.enter_context(_files_of(root)))
            yield files
        if files.aside:
            _tell(KEEP)


def _tell(asked: str) -> None:
    """A UserWarning, at the call of the function of the user, where no merge in memory will hold what is trained."""
    wanted = f"merge_checkpoint(..., into={asked!r}), or surgery merge --into {asked}, of the saved adapter writes it"
    if asked not in (KEEP, *HELD_IN):
        wanted = f"no merge writes it either, for {UNMADE['into', asked]}"
    told = f"{_OPTION} is {asked!r}, which no layer in memory is merged into; {wanted}"
    warnings.warn(told, stacklevel=5)  # past contextlib, and the function that is called


def _files_of(root: Any) -> Checkpoint:
    """At the commit that it was loaded from, where that was on the Hub. UsageError where the model tells of none."""
    config = getattr(root, "config", None)
    where, commit = getattr(config, "_name_or_path", None), getattr(config, "_commit_hash", None)
    if not isinstance(where, str) or not where:
        raise UsageError(
            f"{_OPTION} is 'keep', and the model does not tell which files it was loaded from; load it by "
            "from_pretrained, or give a format"
        )
    return checkpoint(f"{where}@{commit}" if commit and not os.path.lexists(where) else where)
