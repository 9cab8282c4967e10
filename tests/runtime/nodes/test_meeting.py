import threading

from qdist.host.run.rundir import Ended
from qdist.runtime.nodes.beats import Beats
from qdist.runtime.nodes.meeting import Meeting
from tests.runtime.nodes.stores import MemoryStore


class Met(Meeting):
    """The first of three nodes, which serves the store."""

    def __init__(self, store: MemoryStore) -> None:
        self._node, self._most, self.serves, self.store = 0, 3, True, store
        self.beats = Beats(store, 0, serves=True)


def test_who_serves_the_store_stays_until_a_node_that_is_in_no_generation_has_heard_of_the_end() -> None:
    store = MemoryStore()
    first, second = Met(store), Beats(store, 1, serves=False)
    first.beats.beat_once()
    second.beat_once()
    ending = threading.Thread(target=first.end, args=(Ended(state="stopped", time=0.0),), daemon=True)
    ending.start()
    ending.join(0.3)
    assert ending.is_alive()
    store.set("gone/1", "1")
    ending.join(10)
    assert not ending.is_alive()
    assert first.ended() == Ended(state="stopped", time=0.0)
