"""Run all of tests/faults and the zoo of tests/hostile, and print the tally.

Exit code 1 if a test failed, an input ended otherwise than it must, or a byte was lost.
"""

import json
import os
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path

HERE = Path(__file__).parent
COUNTED = ("points killed at", "states replayed", "errors injected", "signals sent", "processes raced")
INPUTS = ("inputs refused", "inputs handled", "inputs wrong", "inputs hung")
LOST = "bytes lost"


def main() -> int:
    workers = sys.argv[1] if len(sys.argv) > 1 else "0"
    with tempfile.TemporaryDirectory() as folder:
        sums, inputs = Path(folder, "sums.json"), Path(folder, "inputs.json")
        tests = [sys.executable, "-m", "pytest", "-q", "-n", workers, str(HERE)]
        codes = [_run(tests, SURGERY_FAULTS_TALLY=str(sums))]
        codes.append(_run([sys.executable, str(HERE.parent / "hostile" / "tally.py"), str(inputs)]))
        tally = Counter(json.loads(sums.read_text())) + Counter(json.loads(inputs.read_text()))
    print("\n| what | count |\n| --- | ---: |")
    for name in (*COUNTED, *INPUTS, LOST):
        print(f"| {name} | {tally[name]:,} |")
    return int(any(codes) or tally[LOST] > 0)


def _run(command: list[str], **environment: str) -> int:
    return subprocess.run(command, check=False, env=os.environ | environment, cwd=HERE.parents[1]).returncode


if __name__ == "__main__":
    sys.exit(main())
