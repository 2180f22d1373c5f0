"""Printing: letters as they are where the stream's encoding has them, else escaped."""

import io
import re
import sys
from typing import Any

import click


def say(text: str, *, err: bool = False, nl: bool = True) -> None:
    """Print it on stdout, or on stderr."""
    click.echo(held(text, sys.stderr if err else sys.stdout), err=err, nl=nl)


_OPTION = re.compile("`([a-z][a-z0-9_]*)(?:=([^`]*))?`")  # as messages name one: `into`, or `into=keep`


def spelled(text: str, commands: click.Group) -> str:
    """`text` with the options of these commands as they are given to them: --into, or --into keep."""
    every = [one for command in commands.commands.values() for one in command.params if isinstance(one, click.Option)]
    known = {one.name: max(one.opts, key=len) for one in every} | {"swappable": "--adapters swappable"}

    def told(found: re.Match[str]) -> str:
        name, value = found.groups()
        return " ".join([known[name], *([] if value in {None, "True"} else [value])]) if name in known else found[0]

    return _OPTION.sub(told, text)


def note(text: str, *, err: bool = False) -> None:
    """Print what a plan remarks, within a command."""
    commands = click.get_current_context().find_root().command
    say(spelled(text, commands) if isinstance(commands, click.Group) else text, err=err)


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
