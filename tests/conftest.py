"""How the whole suite is run: what costs each test least.

Two processes take a file at a time (`make unit`). Files of many long tests come first: one that is begun last would
keep one process at work while the other has nothing left to do.
"""

import gc
from collections import Counter

import pytest


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    long = Counter(item.path for item in items if item.get_closest_marker("slow"))
    items.sort(key=lambda item: -long[item.path])


def pytest_collection_finish() -> None:
    """Libraries and collected tests stay to the end, and every full garbage collection would walk them for 0.6 s."""
    gc.collect()
    gc.freeze()
