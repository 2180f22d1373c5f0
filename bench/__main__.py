"""Run every benchmark in a fresh process, print one table, and write it to RESULTS.md and the README."""

import json
import os
import platform
import subprocess
import sys
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
MARKS = "<!-- figures: written by `make bench` -->", "<!-- end of figures -->"


def main() -> None:
    rows = [row for name in BENCHMARKS for row in run(name)]
    text = f"{table(('what', 'surgery', 'peft', 'ratio', 'wanted'), rows)}\n\n{machine()}"
    RESULTS.write_text(f"# Results\n\n{text} Written by `make bench`; both sides ran in turn, on the same files.\n")
    put_between(README, MARKS, text)
    print(text)


def run(name: str) -> list[list[str]]:
    """The rows that one benchmark prints."""
    print(f"bench: {name}", file=sys.stderr)
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}
    done = subprocess.run(
        [sys.executable, "-m", f"bench.{name}"], env=environment, check=True, capture_output=True, text=True
    )
    rows: list[list[str]] = json.loads(done.stdout.splitlines()[-1])
    return rows


def machine() -> str:
    packages = ", ".join(f"{name} {version(name)}" for name in ("torch", "peft", "transformers"))
    return f"{os.cpu_count()} cores, {platform.machine()}, Python {platform.python_version()}, {packages}."


if __name__ == "__main__":
    main()
