"""For all tests: what is there when they begin, torch and all the tests, is not looked through for cycles again."""

import gc


def pytest_collection_finish() -> None:
    gc.freeze()
