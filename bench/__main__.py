"""Run every benchmark in a fresh process, print one table and write it to RESULTS.md."""

import json
import os
import platform
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

BENCHMARKS = ("inject", "load", "forward", "merge")
RESULTS = Path(__file__).parent / "RESULTS.md"


def main() -> None:
    rows = [row for name in BENCHMARKS for row in run(name)]
    lines = [
        "# Results",
        "",
        machine(),
        "",
        "| what | surgery | peft | ratio | wanted |",
        "| --- | --- | --- | --- | --- |",
    ]
    lines += ["| " + " | ".join(row) + " |" for row in rows]
    lines += ["", "Written by `make bench`; both sides run in the same process group, on the same files."]
    text = "\n".join(lines) + "\n"
    RESULTS.write_text(text)
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
