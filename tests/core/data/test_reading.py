"""How records are read: formats, and names of columns and roles."""

import pytest

from qdist.core.data.reading import Reading, reading_of
from qdist.core.errors import SpecError
from qdist.core.spec.sections import Data


def test_nothing_said_is_nothing_known():
    assert reading_of(Data(), "auto") == Reading()


def test_columns_and_roles_are_names_of_ours_for_theirs():
    data = Data(columns=("instruction=question", "output = the answer"), roles=("user=Customer",))
    assert reading_of(data, "alpaca") == Reading(
        format="alpaca", columns={"instruction": "question", "output": "the answer"}, roles={"user": "Customer"}
    )


@pytest.mark.parametrize("pair", ["question", "=question", "instruction=", " = "])
def test_a_name_without_another_is_refused(pair):
    with pytest.raises(SpecError, match="not OURS=THEIRS") as caught:
        reading_of(Data(columns=(pair,)), "auto")
    assert caught.value.try_ == "--set data.columns=instruction=question"


def test_a_name_of_ours_stands_for_one_of_theirs():
    with pytest.raises(SpecError, match=r"data\.roles names 'user' twice: 'A' and 'B'"):
        reading_of(Data(roles=("user=A", "user=B")), "auto")
