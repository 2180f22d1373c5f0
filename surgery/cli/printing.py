"""Printing: letters as they are where the stream's encoding has them, else escaped."""

import io
import sys
from typing import Any

import click


def say(text: str, *, err: bool = False, nl: bool = True) -> None:
    """Print it on stdout, or on stderr."""
    click.echo(held(text, sys.stderr if err else sys.stdout), err=err, nl=nl)


def hold_letters() -> None:
    """What libraries print on stdout is escaped too where it cannot be held; Python does so on stderr alone."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")


def held(text: str, stream: Any) -> str:
    r"""`text` with the characters that `stream` cannot hold escaped; click would write UTF-8 to an ascii terminal.

    >>> print(held("größe", open("/dev/null", encoding="ascii")))
    gr\xf6\xdfe
    """
    encoding = getattr(stream, "encoding", None) or "utf-8"
    return text.encode(encoding, "backslashreplace").decode(encoding)
