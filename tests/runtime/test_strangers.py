"""A few hundred spoiled files: every reader reads them or says a sentence. `python -m bench.chaos.readers` has more."""

import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from bench.chaos.readers import run_one
from bench.chaos.strangers import make_world


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_world(tmp_path_factory.mktemp("strangers") / "world")


@pytest.fixture(autouse=True)
def alarm() -> Iterator[None]:
    before = signal.signal(signal.SIGALRM, signal.default_int_handler)
    yield
    signal.signal(signal.SIGALRM, before)


def test_spoiled_files_are_read_or_refused_in_a_sentence(world: Path) -> None:
    found = {number: finding for number in range(300) if (finding := run_one(number, 15, world))}
    assert not found
