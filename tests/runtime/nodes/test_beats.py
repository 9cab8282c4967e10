import pytest

from qdist.runtime.nodes.beats import LOST_S, Beats
from tests.runtime.nodes.stores import MemoryStore

BEATS = int(LOST_S)


def three() -> tuple[MemoryStore, list[Beats]]:
    store = MemoryStore()
    beats = [Beats(store, node, serves=node == 0) for node in range(3)]
    beats[0].watch((0, 1, 2))
    return store, beats


def test_a_node_that_beats_no_more_is_lost_after_ten_beats_of_who_watches() -> None:
    _, (first, second, third) = three()
    for _ in range(3):
        for own in (first, second, third):
            own.beat_once()
    for _ in range(BEATS):  # its last beat is heard in the first of these
        second.beat_once()
        first.beat_once()
    assert first.silent() == {}
    second.beat_once()
    first.beat_once()
    assert first.silent() == {2: LOST_S}


def test_a_node_that_was_stopped_itself_takes_nobody_for_lost() -> None:
    _, (first, second, third) = three()
    for own in (first, second, third):
        own.beat_once()
    for _ in range(10 * BEATS):  # the others go on while the first one is stopped
        second.beat_once()
        third.beat_once()
    first.beat_once()
    assert first.silent() == {}


def test_a_node_that_never_beat_is_lost_as_well() -> None:
    _, (first, second, _) = three()
    for _ in range(BEATS):
        second.beat_once()
        first.beat_once()
    assert list(first.silent()) == [2]


def test_who_left_is_not_watched_any_more() -> None:
    _, (first, *_) = three()
    for _ in range(BEATS):
        first.beat_once()
    first.watch(())
    assert first.silent() == {}


def test_a_store_that_is_gone_is_no_silence_of_others() -> None:
    store, (first, *_) = three()
    first.beat_once()
    store.gone = True
    with pytest.raises(RuntimeError):
        first.beat_once()
    assert first.silent() == {}
