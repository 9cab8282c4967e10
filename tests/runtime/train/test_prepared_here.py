"""Does a rank take model and data from where its own node has prepared them?"""

from pathlib import Path

import msgspec
import pytest

from qdist.core.errors import RunError
from qdist.core.planning.plan import DataFacts, Plan, Prepared
from qdist.runtime.train.rank import as_prepared_here
from tests.plans import gpus, planned


def plan_of(folder: str) -> Plan:
    """A plan of a model and data that a node has prepared in a folder."""
    made = planned("smollm2-135m", gpus(1, 24), {"gpus": 1})
    source = msgspec.structs.replace(made.source, kind="folder", packed=f"{folder}/packed", digest="5")
    data = DataFacts(
        path=f"{folder}/tokens", samples=9, train_samples=8, held_out_samples=1, tokens=90, longest=10, digest="7"
    )
    return msgspec.structs.replace(made, source=source, data=data)


def test_paths_are_the_nodes_own_and_all_else_is_the_plans(tmp_path: Path) -> None:
    leaders, own = plan_of("/leader"), plan_of("/own")
    file = tmp_path / "prepared001.json"
    file.write_bytes(msgspec.json.encode(Prepared(source=own.source, data=own.data)))
    assert as_prepared_here(leaders, str(file)) == own
    assert as_prepared_here(leaders, "") == leaders


def test_a_file_that_is_gone_is_told(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"prepared001\.json"):
        as_prepared_here(plan_of("/leader"), str(tmp_path / "prepared001.json"))
