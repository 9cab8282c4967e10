"""Records of published data sets give what their authors meant to be given, and what they meant to be learned."""

import pytest

from qdist.core.data.named import NAMED
from qdist.core.data.records import conversations
from tests.core.data.published import PUBLISHED, Published


@pytest.mark.parametrize("own", PUBLISHED, ids=lambda own: own.name)
def test_a_published_record_is_read_as_it_was_meant(own: Published) -> None:
    (found,) = conversations(own.record, where="f.jsonl:1", reading=own.reading)
    assert found.format == own.format
    assert tuple(turn.said for turn in found.turns if not turn.learn) == own.given
    assert tuple(turn.said for turn in found.turns if turn.learn) == own.learned


def test_there_are_thirty() -> None:
    assert len({own.name for own in PUBLISHED}) == len(PUBLISHED) >= 30


@pytest.mark.parametrize("name", NAMED)
def test_a_data_set_known_by_name_is_read_as_its_record_is(name: str) -> None:
    own = next(own for own in PUBLISHED if own.name == name)
    named, found = (conversations(own.record, where="", reading=each) for each in (NAMED[name].reading, own.reading))
    assert named == found
