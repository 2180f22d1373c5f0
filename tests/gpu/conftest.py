"""What runs on a GPU: all of it is marked `gpu`, and skipped where there is none."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from device import DEVICE, IS_THERE

HERE = Path(__file__).parent


class Absent(pytest.Module):
    """A file of tests without the device that they need, skipped whole: thousands of skips would take a while."""

    def collect(self) -> Iterator[pytest.Item]:
        pytest.skip(f"needs {DEVICE}, which is not there")


def pytest_pycollect_makemodule(module_path: Path, parent: pytest.Collector) -> pytest.Module | None:
    found: pytest.Module | None = None if IS_THERE else Absent.from_parent(parent, path=module_path)
    return found


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.gpu)
