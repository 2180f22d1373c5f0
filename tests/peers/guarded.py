"""Runs files of tests once more, where peft is not installed."""

import os
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

HERE = Path(__file__).parent


def passed_without_peft(files: Iterable[str]) -> Counter[str]:
    """How many tests of each file pass there; AssertionError if one fails."""
    command = [sys.executable, "-m", "pytest", "-vv", "-p", "no:cacheprovider", "-p", "without_peft", *files]
    path = os.pathsep.join([str(HERE), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": path, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=HERE.parents[1], check=False)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    return Counter(re.findall(r"^tests/peers/(\w+\.py)::.* PASSED ", done.stdout, re.MULTILINE))


def is_guarded() -> bool:
    """Is this process the one without peft?"""
    return "without_peft" in sys.modules
