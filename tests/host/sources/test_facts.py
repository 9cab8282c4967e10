"""Are facts of an unlisted model read once, in a child process, and from the cache afterwards?"""

from pathlib import Path

import pytest

from qdist.core.errors import JobError, ModelError
from qdist.core.model.aliases import config_of
from qdist.core.model.families import from_config
from qdist.core.requests import Answer, Describe, Request
from qdist.host.sources import facts as of_models

MINE = {"model_type": "mine", "hidden_size": 64}


class Child:
    """Stands for the child process: counts what it is asked, and answers with one model's facts."""

    def __init__(self, *, lost: bool = False) -> None:
        self.asked: list[Describe] = []
        self._lost = lost

    def __call__(self, request: Request, *, device: str | None = None) -> Answer:
        assert isinstance(request, Describe)
        self.asked.append(request)
        return Answer() if self._lost else Answer(facts=from_config(config_of("llama-7b"), name=request.name))


@pytest.fixture
def child(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Child:
    child = Child()
    monkeypatch.setenv("QDIST_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(of_models, "ask", child)
    return child


def test_a_known_family_asks_no_child(child: Child) -> None:
    assert of_models.facts_of(config_of("llama-7b"), name="mine") == from_config(config_of("llama-7b"), name="mine")
    assert child.asked == []
    assert of_models.shape_note(config_of("llama-7b")) == ""


def test_an_unlisted_model_is_described_once_whatever_it_is_called(child: Child) -> None:
    first, second = of_models.facts_of(MINE, name="a"), of_models.facts_of(MINE, name="b")
    assert child.asked == [Describe(config=MINE, name="a")]
    assert (first.name, second.name) == ("a", "b")
    assert first.parameters == second.parameters
    assert of_models.shape_note(MINE) == "qdist has no file for mine: the shape was read from transformers' class"


@pytest.mark.parametrize("other", ["config", "transformers", "description"])
def test_another_configuration_or_version_is_described_anew(
    child: Child, monkeypatch: pytest.MonkeyPatch, other: str
) -> None:
    of_models.facts_of(MINE, name="mine")
    if other == "transformers":
        monkeypatch.setattr("importlib.metadata.version", lambda _: "99")
    if other == "description":
        monkeypatch.setattr(of_models, "_DESCRIPTION", 99)
    of_models.facts_of(MINE | ({"hidden_size": 128} if other == "config" else {}), name="mine")
    assert len(child.asked) == 2


def test_a_damaged_entry_of_the_cache_is_written_again(child: Child, tmp_path: Path) -> None:
    of_models.facts_of(MINE, name="mine")
    (entry,) = (tmp_path / "cache" / "facts").iterdir()
    entry.write_text("{")
    of_models.facts_of(MINE, name="mine")
    assert len(child.asked) == 2
    assert entry.read_text() != "{"


def test_a_configuration_without_a_model_type_is_refused_without_a_child(child: Child) -> None:
    with pytest.raises(ModelError, match="has no model_type"):
        of_models.facts_of({}, name="mine")
    assert child.asked == []


def test_a_child_that_says_nothing_is_an_error(child: Child, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(of_models, "ask", Child(lost=True))
    with pytest.raises(JobError, match="the class of mine was not described"):
        of_models.facts_of(MINE, name="mine")
