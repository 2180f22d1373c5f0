"""Runs a file of tests once more, where peft is not installed."""

import os
import re
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent


def passed_without_peft(file: str) -> int:
    """How many of the file's tests pass there; AssertionError if one fails."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "without_peft", file]
    path = os.pathsep.join([str(HERE), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": path, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=HERE.parents[1], check=False)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    found = re.search(r"(\d+) passed", done.stdout)
    assert found is not None
    return int(found[1])


def is_guarded() -> bool:
    """Is this process the one without peft?"""
    return "without_peft" in sys.modules
