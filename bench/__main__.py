"""Run every benchmark in a fresh process, print one table, and write it to RESULTS.md and the README."""

import json
import os
import platform
import subprocess
import sys
from collections.abc import Iterable
from importlib.metadata import version
from pathlib import Path

from bench.words import put_between, table

BENCHMARKS = (
    "inject",
    "load",
    "forward",
    "train",
    "step",
    "quantized_step",
    "merge",
    "quantized",
    "export",
    "export_speed",
)
RESULTS = Path(__file__).parent / "RESULTS.md"
README = RESULTS.parents[1] / "README.md"
HEAD = ("what", "surgery", "peft", "ratio", "wanted")
MARKS = "<!-- figures: written by `make bench` -->", "<!-- end of figures -->"


def main() -> None:
    text = f"{measured(BENCHMARKS, 'cpu')}\n\n{os.cpu_count()} cores, {machine()}"
    put_between(RESULTS, MARKS, f"{text} Both sides ran in turn, on the same files.")
    put_between(README, MARKS, text)
    print(text)


def measured(names: Iterable[str], device: str) -> str:
    """The table of what the benchmarks print that is run on a device."""
    return table(HEAD, [row for name in names for row in run(name, device)])


def run(name: str, device: str) -> list[list[str]]:
    """The rows that one benchmark prints; its arguments follow its name."""
    print(f"bench: {name}", file=sys.stderr)
    quiet = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error", "BENCH_DEVICE": device}
    command = [sys.executable, "-m", *f"bench.{name}".split()]
    done = subprocess.run(command, env=os.environ | quiet, check=True, stdout=subprocess.PIPE, text=True)
    rows: list[list[str]] = json.loads(done.stdout.splitlines()[-1])
    return rows


def machine() -> str:
    packages = ", ".join(f"{name} {version(name)}" for name in ("torch", "peft", "transformers"))
    return f"{platform.machine()}, Python {platform.python_version()}, {packages}."


if __name__ == "__main__":
    main()
