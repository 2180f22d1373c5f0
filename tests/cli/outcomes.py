"""What a command leaves, and how the tests of the command line read it."""

import json
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest

from surgery.cli import main


class Outcome(NamedTuple):
    """An exit code and the two streams."""

    code: int
    out: str
    err: str


Run = Callable[..., Outcome]


def called(capsys: pytest.CaptureFixture[str], *arguments: object) -> Outcome:
    """What the command line leaves, called as a user calls it."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        main([str(one) for one in arguments])
    code = stopped.value.code
    assert code is None or isinstance(code, int)
    return Outcome(code or 0, *capsys.readouterr())


def rows(found: Outcome) -> list[list[str]]:
    """The cells of a table on stdout, without its header; two spaces or more part them."""
    return [re.split(r"\s{2,}", line.rstrip()) for line in found.out.splitlines()[1:]]


def parsed(found: Outcome) -> dict[str, Any]:
    """The report on stdout, as a strict reader takes it: NaN and Infinity are no JSON."""

    def refuse(word: str) -> None:
        raise ValueError(f"{word} is no JSON")

    value: dict[str, Any] = json.loads(found.out, parse_constant=refuse)
    return value


def told(found: Outcome, code: int) -> str:
    """The message of a failure: one line that begins with `surgery: `, printable, without a traceback."""
    assert found.code == code, found
    assert found.err.endswith("\n"), found.err
    line = found.err[:-1]
    assert line.startswith("surgery: "), found.err
    assert line.isprintable(), found.err
    assert "Traceback" not in line
    return line.removeprefix("surgery: ")
