"""What runs on a GPU: all of it is marked `gpu`, and skipped where there is none."""

import sys
from pathlib import Path

import pytest
from device import DEVICE, IS_THERE

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parent / folder) for folder in ("laws", "procedures", "peers")]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.gpu)
            if not IS_THERE:
                item.add_marker(pytest.mark.skip(reason=f"needs {DEVICE}, which is not there"))
