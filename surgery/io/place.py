"""Place: where an output goes, and how a folder made beside it gets there, whole or not at all."""

import os
from collections.abc import Callable, Iterable
from pathlib import Path

from surgery.errors import OutputExistsError, printable
from surgery.io import disk
from surgery.io.durable import remove_all, sync_folder

_CONFIGS, _WEIGHTS = ("config.json", "adapter_config.json"), (".safetensors", ".onnx")


class Place:
    """`out`, and beside it `folder`, in which its successor is made, and `aside`, where its predecessor waits."""

    def __init__(self, out: Path) -> None:
        self.out = Path.cwd() / out
        self.folder = self.out.with_name(f".{self.out.name}.surgery-staging")
        self.aside = self.out.with_name(f".{self.out.name}.surgery-old")

    def refuse_taken(self, overwrite: bool) -> None:
        """OutputExistsError if `out` exists, unless it may be overwritten and holds what models and adapters do."""
        if os.path.lexists(self.out) and not overwrite:
            raise OutputExistsError(
                f"{printable(self.out)}: it exists; a new folder is wanted; or give `overwrite=True`"
            )
        if os.path.lexists(self.out) and not _is_output(self.out):
            raise OutputExistsError(
                f"{printable(self.out)}: it holds no model and no adapter; `overwrite` would remove all of it; "
                "name another, or remove it first"
            )

    def mend(self) -> None:
        """What a run that was cut short has left half done is taken back."""
        if os.path.lexists(self.folder) or os.path.lexists(self.aside):
            sync_folder(self.out.parent)  # the names that it has changed, before what they name is removed
        self._put_back()

    def take(self, journal: Path) -> None:
        """The folder, without its journal, becomes `out`; what was there is gone.

        On an error all is as it was, without the folder.
        """
        try:
            disk.remove(journal)
            for path in (*(path for path in self.folder.rglob("*") if path.is_dir()), self.folder):
                sync_folder(path)
            take_back = self._switch()
        except OSError:
            self._put_back()
            remove_all(self.folder)
            raise
        try:
            sync_folder(self.out.parent)
        except OSError:
            take_back()
            remove_all(self.folder)
            raise
        remove_all(self.folder)
        remove_all(self.aside)

    def _put_back(self) -> None:
        """Where names cannot change places at once, a run may have died between its two renames."""
        if os.path.lexists(self.aside) and not os.path.lexists(self.out):
            disk.rename(self.aside, self.out)
        remove_all(self.aside)

    def _switch(self) -> Callable[[], object]:
        """The folder becomes `out`, and what was there goes aside; returns what takes that back."""
        if not os.path.lexists(self.out):
            try:
                disk.place(self.folder, self.out)
            except FileExistsError as error:
                remove_all(self.folder)
                raise OutputExistsError(f"{printable(self.out)}: it has appeared meanwhile; name another") from error
            return lambda: disk.rename(self.out, self.folder)
        if disk.exchange(self.folder, self.out):
            return lambda: disk.exchange(self.folder, self.out)
        disk.rename(self.out, self.aside)
        disk.rename(self.folder, self.out)
        return self._go_back

    def _go_back(self) -> None:
        disk.rename(self.out, self.folder)
        disk.rename(self.aside, self.out)


def _is_output(folder: Path) -> bool:
    """Is it a folder that is empty, or holds itself, not in folders within, what models and adapters consist of?"""
    if not folder.is_dir():
        return False
    with os.scandir(folder) as found:
        names = [one.name for one in found]
    return not names or any(name in _CONFIGS or name.endswith(_WEIGHTS) for name in names)


def refuse_overlap(out: Path, inputs: Iterable[Path]) -> None:
    """OutputExistsError if `out` is an input, lies in one or holds one: writing it would change what is read."""
    target = out.resolve()
    for path in (one.resolve() for one in inputs):
        if target == path or path in target.parents or target in path.parents:
            raise OutputExistsError(
                f"{printable(out)}: it overlaps with {printable(path)}, which is read; name another folder"
            )
