"""The command line: each command parses, calls one api function and prints its report."""

import gc
import logging
import re
import sys
import traceback
from contextlib import suppress
from typing import Any

import click

from surgery.cli.combine import combine
from surgery.cli.demo import demo
from surgery.cli.diff import diff
from surgery.cli.export import export
from surgery.cli.extract import extract
from surgery.cli.inspect import inspect
from surgery.cli.interrupts import Interrupted, listen
from surgery.cli.merge import merge
from surgery.cli.plan import plan
from surgery.cli.printing import hold_letters, say, spelled
from surgery.cli.push import push
from surgery.cli.unmerge import unmerge
from surgery.cli.verify import verify
from surgery.errors import EnvironmentFault, SurgeryError, UsageError, printable, visible

_EPILOG = (
    "Exit codes: 0 done, 2 usage, 3 input refused, 4 a check failed, 5 environment, 6 output exists or is busy, "
    "1 a bug of ours, 128 and its number for a signal."
)

_OUT_OF_MEMORY = "out of memory; close other programs, or use a machine with more"
_NO_MEMORY = re.compile(  # as torch, C++, the threads and the loader of libraries say it, where none says MemoryError
    "allocate memory|not enough memory|out of memory|bad_alloc|can't start new thread|failed to map segment",
    re.IGNORECASE,
)


@click.group(no_args_is_help=False, epilog=_EPILOG, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="model-surgery")
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
def surgery(debug: bool) -> None:
    """Merge adapters into models, verify the outcome, and undo it to the bit.

    BASE and ADAPTER are a folder, a file, or owner/name[@revision] on the Hugging Face Hub.
    """
    del debug  # read in main, which sees the errors
    from surgery.io.memory import keep_freed_memory, require_room_for_torch

    require_room_for_torch()
    keep_freed_memory()


for command in (inspect, plan, merge, verify, unmerge, combine, extract, diff, export, push, demo):
    surgery.add_command(command)


def main(arguments: list[str] | None = None) -> None:
    """Run the command line; an error is one line on stderr, and its exit code."""
    given = sys.argv[1:] if arguments is None else arguments
    if arguments is None:  # as a program of its own; in another's process signals, loggers and the collector are its
        from surgery.core.collector import collect_seldom

        listen()
        _hush()
        hold_letters()
        collect_seldom()
    try:
        code = _run(given)
    except (Exception, Interrupted) as error:  # noqa: BLE001  # the last resort: a bug of ours is one line too
        if "--debug" in given:
            traceback.print_exc()
        message, code = _told(error)
        with suppress(OSError):  # the code says it too
            told = "; ".join([f"surgery: {message}", *getattr(error, "__notes__", ())])
            say(spelled(told, surgery), err=True)
    if arguments is None:
        gc.freeze()  # looking through all of torch for cycles at the exit takes 0.3 seconds
    sys.exit(code)


def _hush() -> None:
    """Without what torchao, which transformers imports, logs of parts that it lacks, and torch of how it is written."""
    for name in ("torchao", "torch.utils._pytree"):
        logging.getLogger(name).setLevel(logging.CRITICAL)


def _run(arguments: list[str]) -> Any:
    try:
        return surgery.main(arguments, prog_name="surgery", standalone_mode=False)
    except click.exceptions.Exit as error:
        return error.exit_code
    except click.UsageError as error:
        command = error.ctx.command_path if error.ctx else "surgery"
        if isinstance(error, click.MissingParameter) and error.ctx and isinstance(error.param, click.Argument):
            wanted = " ".join([command, *error.ctx.command.collect_usage_pieces(error.ctx)[1:]])
            raise UsageError(f"too few arguments; `{wanted}` is wanted; `{command} --help` says more") from error
        raise UsageError(
            f"{visible(error.format_message().rstrip('.'))}; `{command} --help` says what is wanted"
        ) from error


def _told(error: BaseException) -> tuple[str, int]:
    """The line and the exit code of an error."""
    interrupted = Interrupted.within(error)
    if interrupted is not None or isinstance(error, click.Abort):
        return "interrupted", 130 if interrupted is None else interrupted.exit_code
    match error:
        case SurgeryError():
            return str(error), error.exit_code
        case OSError():
            where = "" if error.filename is None else f"{printable(error.filename)}: "
            found = error.strerror or str(error) or type(error).__name__
            return f"{where}{printable(found)}; see to the disk and run again", EnvironmentFault.exit_code
        case MemoryError():
            return _OUT_OF_MEMORY, EnvironmentFault.exit_code
        case RuntimeError() | ImportError() if _NO_MEMORY.search(str(error)):
            return _OUT_OF_MEMORY, EnvironmentFault.exit_code
    return _unforeseen(error)


def _unforeseen(error: BaseException) -> tuple[str, int]:
    """The same, of one that nothing here raises: after a signal that was dropped, it came of that."""
    come = Interrupted.come()
    if come is not None:
        return "interrupted", come.exit_code
    found = f"{type(error).__name__}: {printable(error)}"
    return f"{found}; this is a bug of surgery; run again with --debug and report it", 1
