import pytest

from qdist.core.nodes.facts import Written
from qdist.runtime.nodes.board import Board, CutOff, Disrupted
from tests.runtime.nodes.stores import MemoryStore


def nothing() -> None:
    """Others are all right."""


def test_what_one_node_puts_another_takes() -> None:
    store = MemoryStore()
    Board(store, nothing).put("files", Written(files={"plan.json": "{}"}))
    there = Board(store, nothing)
    assert there.has("files")
    assert there.take("files", Written).files == {"plan.json": "{}"}
    assert there.find("nothing", str) is None


def test_waiting_ends_where_a_node_is_lost() -> None:
    def lost() -> None:
        raise Disrupted

    with pytest.raises(Disrupted):
        Board(MemoryStore(), lost).take("files", Written)


def test_waiting_ends_with_its_limit() -> None:
    with pytest.raises(Disrupted, match="files"):
        Board(MemoryStore(), nothing).take("files", Written, limit_s=0.0)


def test_a_store_that_is_gone_cuts_off() -> None:
    store = MemoryStore()
    store.gone = True
    board = Board(store, nothing)
    for ask in (lambda: board.put("a", 1), lambda: board.has("a"), lambda: board.take("a", int)):
        with pytest.raises(CutOff, match="connection reset"):
            ask()
