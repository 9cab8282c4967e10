"""Is an error of a prediction the same everywhere, and do tables say which way round it goes?"""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from qdist.core.telemetry.memory_report import MEANING, error, shown_error

DOCS = Path(__file__).parents[3] / "docs"


@pytest.mark.parametrize(
    ("predicted", "measured", "share", "shown"),
    [
        (103, 100, 0.03, "+3.0 %"),
        (97, 100, -0.03, "-3.0 %"),
        (100, 100, 0.0, "+0.0 %"),
        (99.99, 100, -0.0001, "+0.0 %"),
        (0, 100, None, ""),
        (100, 0, None, ""),
        (100, None, None, ""),
        (None, 100, None, ""),
    ],
)
def test_more_predicted_than_measured_is_plus(
    predicted: float | None, measured: float | None, share: float | None, shown: str
) -> None:
    assert error(predicted, measured) == (None if share is None else pytest.approx(share))
    assert shown_error(predicted, measured) == shown


def test_the_words_say_what_the_function_does() -> None:
    assert "+3 %" in MEANING
    assert "more was predicted than measured" in MEANING
    assert shown_error(103, 100) == "+3.0 %"


def written(text: str) -> Iterator[tuple[str, float, float, float, float]]:
    """(row, predicted, measured, error, half a unit of the last digit as a share) of the tables of a page."""
    columns: list[tuple[int, int, int]] = []
    for line in text.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if not line.startswith("|"):
            columns = []
        elif "error" in cells and any(re.search("predicted|planned", cell) for cell in cells):
            columns = [(at - 2, at - 1, at) for at, cell in enumerate(cells) if cell == "error"]
        for predicted, measured, off in columns:
            numbers = [cells[at].replace(",", "").removesuffix(" %") for at in (predicted, measured, off)]
            if all(re.fullmatch(r"[+-]?[0-9.]+", number) for number in numbers):
                one, other, stated = map(float, numbers)
                digits = len(numbers[1].partition(".")[2])
                yield line, one, other, stated, 10.0**-digits / other if other else 0.0


@pytest.mark.parametrize("page", ["runs.md", "decisions.md"])
def test_errors_in_the_documents_have_the_same_sign(page: str) -> None:
    found = list(written((DOCS / page).read_text()))
    assert found
    for line, predicted, measured, stated, unit in found:
        assert stated == pytest.approx(100 * (predicted / measured - 1), abs=0.06 + 110 * unit), line
