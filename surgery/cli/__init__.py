"""The command line: each command parses, calls one api function and prints its report."""

import sys
from typing import Any

import click

from surgery.cli.demo import demo
from surgery.cli.inspect import inspect
from surgery.cli.merge import merge
from surgery.cli.plan import plan
from surgery.cli.unmerge import unmerge
from surgery.cli.verify import verify
from surgery.errors import EnvironmentFault, SurgeryError, printable

_EPILOG = (
    "Exit codes: 0 done, 2 usage, 3 input refused, 4 a check failed, 5 environment, 6 output exists or is busy, "
    "1 a bug of ours."
)


@click.group(epilog=_EPILOG, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="model-surgery")
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
def surgery(debug: bool) -> None:
    """Merge adapters into models, verify the outcome, and undo it to the bit.

    BASE and ADAPTER are a folder, a file, or owner/name[@revision] on the Hugging Face Hub.
    """
    del debug  # read in main, which sees the errors


for command in (inspect, plan, merge, verify, unmerge, demo):
    surgery.add_command(command)


def main(arguments: list[str] | None = None) -> None:
    """Run the command line; an error is one line on stderr, and its exit code."""
    given = sys.argv[1:] if arguments is None else arguments
    if "--debug" in given:
        surgery(given)
    try:
        sys.exit(_run(given))
    except SurgeryError as error:
        _fail(str(error), error.exit_code)
    except OSError as error:
        _fail(
            f"{printable(error.filename)}: {error.strerror}; see to the disk and run again", EnvironmentFault.exit_code
        )
    except MemoryError:
        _fail("out of memory; close other programs, or use a machine with more", EnvironmentFault.exit_code)


def _run(arguments: list[str]) -> Any:
    try:
        return surgery.main(arguments, prog_name="surgery", standalone_mode=False)
    except click.exceptions.Exit as error:
        return error.exit_code
    except click.Abort:
        _fail("interrupted", 130)
    except click.ClickException as error:
        error.show()
        return error.exit_code


def _fail(message: str, code: int) -> None:
    click.echo(f"surgery: {message}", err=True)
    sys.exit(code)
