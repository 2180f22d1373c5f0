"""Run all of tests/faults and tests/hostile, and print the tally. Exit code 1 if a test failed or a byte was lost."""

import json
import os
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ET  # of pytest's own report
from collections import Counter
from pathlib import Path

HERE = Path(__file__).parent
COUNTED = ("points killed at", "states replayed", "errors injected", "signals sent", "processes raced")
INPUTS = ("inputs refused or handled", "inputs let through", "inputs hung")
LOST = "bytes lost"


def main() -> int:
    workers = sys.argv[1] if len(sys.argv) > 1 else "0"
    with tempfile.TemporaryDirectory() as folder:
        sums, report = Path(folder, "sums.json"), Path(folder, "report.xml")
        codes = [_pytest(HERE, "-n", workers, environment={"SURGERY_FAULTS_TALLY": str(sums)})]
        codes.append(_pytest(HERE.parent / "hostile", "-n", workers, f"--junitxml={report}"))
        tally = Counter(json.loads(sums.read_text())) + _inputs(report)
    print("\n| what | count |\n| --- | ---: |")
    for name in (*COUNTED, *INPUTS, LOST):
        print(f"| {name} | {tally[name]:,} |")
    return int(any(codes) or tally[LOST] > 0)


def _pytest(*arguments: str | Path, environment: dict[str, str] | None = None) -> int:
    command = [sys.executable, "-m", "pytest", "-q", *map(str, arguments)]
    return subprocess.run(command, check=False, env=os.environ | (environment or {}), cwd=HERE.parents[1]).returncode


def _inputs(report: Path) -> Counter[str]:
    """Each hostile input is a test."""
    found: Counter[str] = Counter()
    for case in ET.parse(report).iter("testcase"):
        failures = [*case.iter("failure"), *case.iter("error")]
        if not failures:
            found[INPUTS[0]] += case.find("skipped") is None
        else:
            hung = "no answer" in str(failures[0].get("message"))
            found[INPUTS[2 if hung else 1]] += 1
    return found


if __name__ == "__main__":
    sys.exit(main())
