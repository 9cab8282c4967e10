"""Which files come first: those of many long tests, as two processes take a file at a time (`make unit`).

A long file that is begun last would keep one process at work while the other has nothing left to do.
"""

from collections import Counter

import pytest


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    long = Counter(item.path for item in items if item.get_closest_marker("slow"))
    items.sort(key=lambda item: -long[item.path])
