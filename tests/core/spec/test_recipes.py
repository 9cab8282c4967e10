"""Does every key of another program's recipe take any value, or refuse it with a reason?"""

from contextlib import suppress

import pytest

from qdist.core.errors import SpecError
from qdist.core.spec.recipes.convert import PROGRAMS

ODD = (
    "x", "", "1", "a,b", True, False, 0, -1, 1.5, 10**400, float("nan"), float("inf"), [None], [[1]], {"a": 1}, {1: 2},
    [{"path": None, "type": {"field": 1}, "roles": {"user": [{}]}}], [{"path": "a", "type": ["x"], "shards": 2}],
)  # fmt: skip


@pytest.mark.parametrize(("program", "key"), [(name, key) for name, own in PROGRAMS.items() for key in own.table])
def test_a_key_takes_any_value_or_refuses_it(program: str, key: str) -> None:
    own = PROGRAMS[program]
    for value in ODD:
        with suppress(SpecError):
            outcome = own.table[key].how(value, {**own.defaults, key: value})
            assert all(remark.why for remark in outcome.remarks)


@pytest.mark.parametrize("program", PROGRAMS)
def test_a_default_is_of_a_key_that_is_known(program: str) -> None:
    own = PROGRAMS[program]
    assert set(own.defaults) | own.signs <= set(own.table)
