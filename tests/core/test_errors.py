"""Does an error say what is wrong and the one thing to try?"""

from inspect import getmembers, isclass

import pytest

from qdist.core import errors
from qdist.core.errors import JobError, QdistError, RunError, nearest

KINDS = [kind for _, kind in getmembers(errors, isclass) if issubclass(kind, QdistError)]


@pytest.mark.parametrize("kind", KINDS)
def test_every_error_reads_as_its_message_and_what_to_try(kind: type[QdistError]) -> None:
    error = kind("bits is 5", try_="--bits 4")
    assert (error.message, error.try_) == ("bits is 5", "--bits 4")
    assert str(error) == "bits is 5\n  try: --bits 4"


@pytest.mark.parametrize("kind", KINDS)
def test_an_error_with_nothing_to_try_is_one_line(kind: type[QdistError]) -> None:
    assert str(kind("bits is 5")) == "bits is 5"


def test_the_tree_in_the_docstring_names_every_error() -> None:
    assert [kind.__name__ for kind in KINDS if kind.__name__ not in str(errors.__doc__)] == []
    assert all(kind.__mro__[1] in (QdistError, RunError, Exception) for kind in KINDS)


@pytest.mark.parametrize("kind", KINDS)
def test_what_was_started_and_failed_has_another_exit_code_than_what_cannot_be(kind: type[QdistError]) -> None:
    assert kind.exit_code == (1 if kind is JobError else 2)


@pytest.mark.parametrize(
    ("name", "known", "found"),
    [
        ("lora-r", ("lora.r", "seed"), "lora.r"),
        ("LLAMA-7B", ("llama-7b", "llama-13b"), "llama-7b"),
        ("micro-batch", ("global_batch", "micro_batch"), "micro_batch"),
        ("gatehr", ("gather", "merge"), "gather"),
        ("zzzz", ("gather", "merge"), None),
        ("", ("gather",), None),
        ("gather", (), None),
    ],
)
def test_a_typo_finds_the_nearest_name_or_none(name: str, known: tuple[str, ...], found: str | None) -> None:
    assert nearest(name, known) == found
