"""A run reads its sources one by one: by counts and seeds, as known names say, and with some bad records left out."""

from pathlib import Path

import pytest

from qdist.core.data.conversation import Conversation
from qdist.core.data.reading import AS_FOUND, Reading
from qdist.core.data.sources import SourcePart
from qdist.core.errors import DataError, SpecError
from qdist.core.spec.sections import Data
from qdist.host.data.records import reading_for
from qdist.host.data.sources import (
    check_data,
    count_records,
    data_notes,
    digests_of,
    hub_ids,
    is_local,
    read_source,
    sources_of,
    split_sources,
    unweighted,
)


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def lines(name: str, *texts: str) -> str:
    Path(name).write_text("".join(f'{{"text": "{text}"}}\n' if text else "{}\n" for text in texts))
    return name


def texts_of(data: Data, *, seed: int = 0) -> list[list[str]]:
    read = [list(read_source(source, AS_FOUND, seed=seed)) for source in sources_of(data)]
    return [[found.turns[0].text for found in own if not isinstance(found, DataError)] for own in read]


def test_sources_come_in_order_those_to_evaluate_on_last() -> None:
    lines("a.jsonl", "one", "two")
    lines("b.jsonl", "three")
    lines("c.jsonl", "four")
    assert texts_of(Data(path="b.jsonl,a.jsonl", eval="c.jsonl")) == [["three"], ["one", "two"], ["four"]]
    assert [source.held_out for source in sources_of(Data(path="b.jsonl,a.jsonl", eval="c.jsonl"))] == [0, 0, 1]


def test_a_count_takes_records_by_seed_in_their_order() -> None:
    every = [str(number) for number in range(50)]
    lines("a.jsonl", *every)
    (first,), (again,), (other,) = (texts_of(Data(path="a.jsonl#7"), seed=seed) for seed in (1, 1, 2))
    assert first == again != other
    assert len(first) == len(set(first)) == 7
    assert first == sorted(first, key=int)


def test_more_records_than_there_are_are_refused() -> None:
    lines("a.jsonl", "one", "two")
    with pytest.raises(DataError, match=r"a\.jsonl has 2 records, and 3 are asked for") as caught:
        count_records(Data(path="a.jsonl#3"), AS_FOUND, seed=0)
    assert caught.value.try_ == "--data a.jsonl#2"


def test_names_with_commas_colons_and_hashes_are_files_where_they_exist() -> None:
    for name in ("a,b.jsonl", "c:2", "d#3"):
        lines(name, name)
    assert texts_of(Data(path="a,b.jsonl:1,c:2:1,d#3:1")) == [["a,b.jsonl"], ["c:2"], ["d#3"]]


def test_every_source_is_checked_before_anything_starts() -> None:
    lines("a.jsonl", "one")
    with pytest.raises(DataError, match=r"b\.jsonl does not exist"):
        check_data(Data(path="a.jsonl,b.jsonl"))
    with pytest.raises(DataError, match=r"c\.jsonl does not exist"):
        check_data(Data(path="a.jsonl", eval="c.jsonl"))


@pytest.mark.parametrize(("allowed", "counts"), [(2, (2, 1)), (9, (2, 1)), (1, None), (0, None)])
def test_bad_records_are_left_out_up_to_a_number_over_all_sources(allowed: int, counts: tuple[int, ...] | None) -> None:
    lines("a.jsonl", "one", "", "two")
    lines("b.jsonl", "", "three")
    data = Data(path="a.jsonl,b.jsonl", skip_bad=allowed)
    if counts is not None:
        assert count_records(data, AS_FOUND, seed=0) == counts
        return
    with pytest.raises(DataError, match="2 of 5 records cannot be used"):
        count_records(data, AS_FOUND, seed=0)


def test_weights_of_what_is_evaluated_on_are_refused() -> None:
    with pytest.raises(SpecError, match="every sample is evaluated on once"):
        sources_of(Data(path="a.jsonl", eval="b.jsonl:0.5,c.jsonl:0.5"))


def test_digests_are_those_of_each_source_and_empty_where_a_hub_must_be_asked() -> None:
    lines("a.jsonl", "one")
    lines("b.jsonl", "one")
    one, two, demo, hub = digests_of(Data(path="a.jsonl,b.jsonl,demo,owner/name"))
    assert one == two != ""
    assert demo == hub == ""


def test_data_are_local_if_all_sources_are() -> None:
    lines("a.jsonl", "one")
    assert is_local(Data(path="a.jsonl,demo"))
    assert not is_local(Data(path="a.jsonl", eval="owner/name"))
    assert not is_local(Data(path="alpaca"))


def test_what_is_known_of_a_name_is_said_once_and_the_user_goes_before() -> None:
    assert data_notes(Data(path="alpaca,alpaca@train[:1%]")) == (
        "alpaca is tatsu-lab/alpaca on the hub",
        "alpaca@train[:1%] is tatsu-lab/alpaca on the hub",
    )
    assert reading_for("alpaca", AS_FOUND) == Reading(format="alpaca")
    own = Reading(format="input-output", columns={"input": "instruction"})
    assert reading_for("alpaca", own) == own
    assert reading_for("owner/alpaca", AS_FOUND) == AS_FOUND


def test_a_known_name_is_not_taken_for_a_mistyped_file() -> None:
    lines("alpaca.jsonl", "one")
    assert not is_local(Data(path="alpaca"))
    check_data(Data(path="alpaca"))


@pytest.mark.parametrize(
    ("text", "ids"),
    [
        ("tatsu-lab/alpaca", ("tatsu-lab/alpaca",)),
        ("a/b:main@train#200:0.7,c/d:0.3", ("a/b", "c/d")),
        ("alpaca,alpaca@train[:1%],chip2", ("tatsu-lab/alpaca", "laion/OIG")),
        ("here/a.jsonl,/home/a/b,demo,../a/b,a/b/c,~/a", ()),
        ("gone/a.jsonl,gone/a.jsonl.gz,gone/b.txt,gone/b.parquet", ()),
    ],
)
def test_hub_ids_are_found_among_the_sources(text: str, ids: tuple[str, ...]) -> None:
    Path("here").mkdir()
    assert hub_ids(text) == ids


def test_a_local_file_of_a_known_name_is_no_data_set_of_the_hub() -> None:
    lines("alpaca", '{"text": "a"}')
    assert hub_ids("alpaca") == ()


def test_calibration_reads_sources_without_their_weights() -> None:
    assert unweighted("a.jsonl:0.7,b.jsonl#5:0.3") == "a.jsonl,b.jsonl#5"
    assert split_sources("demo") == (SourcePart("demo"),)


def test_columns_and_roles_are_those_that_the_user_names() -> None:
    Path("a.jsonl").write_text('{"question": "Why?", "reply": "So."}\n')
    Path("b.jsonl").write_text(
        '{"messages": [{"role": "Customer", "content": "Hi"}, {"role": "Agent", "content": "Hello"}]}\n'
    )
    named = Reading(columns={"instruction": "question", "output": "reply"})
    (found,) = read_source(sources_of(Data(path="a.jsonl"))[0], named, seed=0)
    assert isinstance(found, Conversation)
    assert [(turn.role, turn.text) for turn in found.turns] == [("user", "Why?"), ("assistant", "So.")]
    spoken = Reading(roles={"user": "Customer", "assistant": "Agent"})
    (found,) = read_source(sources_of(Data(path="b.jsonl"))[0], spoken, seed=0)
    assert isinstance(found, Conversation)
    assert [turn.role for turn in found.turns] == ["user", "assistant"]
    with pytest.raises(DataError, match="Customer"):
        count_records(Data(path="b.jsonl"), AS_FOUND, seed=0)
