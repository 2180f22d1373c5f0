"""Two processes train one model, by DDP and by FSDP2, sharded before or after the injection: all are in step."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

LAUNCH = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]


@pytest.mark.slow
def test_two_processes_do_what_one_does_and_what_shares_cannot_do_is_refused(tmp_path: Path) -> None:
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, *LAUNCH, Path(__file__).with_name("sharded_run.py"), tmp_path],
        env=os.environ | {"PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stdout.count("all held") == 2
