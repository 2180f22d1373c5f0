"""Journal: the parts of an output that are finished, a line of JSON each, so that an interrupted run can go on."""

import json
import os
from pathlib import Path
from typing import Any

from surgery.io import disk

NAME = ".surgery-journal"  # no file of a checkpoint that is carried begins with a point
_FORMAT = 1


class Journal:
    """Its first line bears `key`, which stands for all that decides the output's bytes."""

    def __init__(self, folder: Path, key: str) -> None:
        self.path, self.key = folder / NAME, key
        self.done: dict[str, Any] = {}  # by part, what was told of it
        self.descriptor = -1

    def read(self) -> bool:
        """Take what a run with the same key has left; false if there is none."""
        try:
            lines = self.path.read_bytes().split(b"\n")[:-1]  # the last line was torn, unless it is empty
        except (FileNotFoundError, NotADirectoryError):
            return False
        found = [_parsed(line) for line in lines]
        if not found or found[0] != {"format": _FORMAT, "key": self.key}:
            return False
        for one in found[1:]:
            if one is not None and isinstance(one.get("part"), str):
                self.done[one["part"]] = one.get("told")
        return True

    def begin(self) -> None:
        """Write what is known now into a new file, and keep it open for more."""
        fresh = self.path.with_name(NAME + ".partial")
        fresh.unlink(missing_ok=True)
        self.descriptor = disk.create(fresh)
        self._line({"format": _FORMAT, "key": self.key})
        for part, told in self.done.items():
            self._line({"part": part, "told": told})
        disk.sync(self.descriptor)
        disk.rename(fresh, self.path)

    def add(self, part: str, told: Any) -> None:
        """A part is finished; on the disk when this returns."""
        self._line({"part": part, "told": told})
        disk.sync(self.descriptor)
        self.done[part] = told

    def close(self) -> None:
        if self.descriptor >= 0:
            os.close(self.descriptor)
            self.descriptor = -1

    def _line(self, value: object) -> None:
        disk.write_all(self.descriptor, json.dumps(value, sort_keys=True).encode() + b"\n")


def _parsed(line: bytes) -> dict[str, Any] | None:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None
