"""Is a node that cannot take part named, with the figures of both sides and what to do?"""

from typing import Any

import msgspec
import pytest

from qdist.core.errors import RunError
from qdist.core.nodes.agreement import (
    require_agreement,
    require_one_run,
    require_own_numbers,
    require_same_prepared,
)
from qdist.core.nodes.facts import NodeFacts, PreparedFacts
from qdist.core.text import GIB
from tests.plans import CPU, gpus

VERSIONS = {"python": "3.11.7", "qdist": "0.1", "torch": "2.13.0", "peft": "0.21.2", "code": "11112222aaaa"}
RUN = "0123456789abcdef"


def node(name: str, **words: Any) -> NodeFacts:
    versions = VERSIONS | words.pop("versions", {})
    usual = NodeFacts(
        node="abcd".index(name), name=name, address="10.0.0.1", versions={k: v for k, v in versions.items() if v},
        clock=1000.0, free_bytes=10 * GIB, cache_free_bytes=10 * GIB, cluster=CPU, gpus=1,
    )  # fmt: skip
    return msgspec.structs.replace(usual, **words)


A = node("a")
THREE = (A, node("b"), node("c"))


def test_two_nodes_of_one_number_are_named_unless_the_run_is_at_work_without_one_of_them() -> None:
    with pytest.raises(RunError, match="b and c are both node 0 of this run") as refused:
        require_own_numbers((node("b", node=0), node("c", node=0), node("d")))
    assert refused.value.try_ == "another --node-rank on one of them"
    require_own_numbers((node("b", active=True), node("c", node=1)))
    require_own_numbers(THREE)


def test_equal_nodes_agree() -> None:
    require_agreement(THREE, needed_bytes=GIB, cache_bytes=GIB, asked=[(999.0, 1001.0)] * 3)
    require_agreement((A, node("b", versions={"python": "3.11.9"})))


@pytest.mark.parametrize(
    ("facts", "words", "message", "advice"),
    [
        (
            (A, node("b", versions={"torch": "2.11.0"})), {},
            "b has torch 2.11.0, and a has torch 2.13.0", "on b: pip install torch==2.13.0",
        ),
        (
            (node("a", versions={"torch": "2.11.0", "peft": "0.1"}), node("b"), node("c")), {},
            "a has torch 2.11.0, peft 0.1, and b has torch 2.13.0, peft 0.21.2",
            "on a: pip install torch==2.13.0 peft==0.21.2",
        ),
        (
            (A, node("b", versions={"peft": ""})), {},
            "b has no peft, and a has peft 0.21.2", "on b: pip install peft==0.21.2",
        ),
        (
            (A, node("b", versions={"deepspeed": "0.19"})), {},
            "b has deepspeed 0.19, and a has no deepspeed", "pip uninstall deepspeed on b, or have it on all",
        ),
        (
            (A, node("b", versions={"python": "3.12.1", "torch": "2.11.0"})), {},
            "b has Python 3.12, torch 2.11.0, and a has Python 3.11, torch 2.13.0",
            "Python 3.11 on b; python = PATH in the hosts file names it",
        ),
        (
            (A, node("b", versions={"code": "33334444bbbb"})), {},
            "b has other code of the same qdist (33334444) than a (11112222)",
            "the same files on both: git pull, or rsync from a to b",
        ),
        (
            (A, node("b", clock=4600.0)), {"asked": [(999.0, 1001.0), (999.0, 1003.0)]},
            "the clock of b is 59 min 57 s ahead of that of a", "timedatectl set-ntp true, on b",
        ),
        (
            (A, node("b", clock=900.0)), {"asked": [(999.0, 1001.0), (1000.0, 1019.0)]},
            "the clock of b is 1 min 40 s behind that of a", "timedatectl set-ntp true, on b",
        ),
        (
            (A, node("b", free_bytes=GIB)), {"needed_bytes": 3 * GIB},
            "b has 1.0 GiB free on the disk of its run directory, and the run needs 3.0 GiB", "make room on b",
        ),
        (
            (A, node("b", cache_free_bytes=GIB)), {"cache_bytes": 3 * GIB},
            "b has 1.0 GiB free on the disk of its cache, and preparing the model needs 3.0 GiB", "make room on b",
        ),
        (
            (A, node("b", cluster=gpus(2, 24), gpus=2)), {},
            "a has no GPU that a run can use, and b has 2 GPUs", "qdist doctor on a, or leave it out",
        ),
        (
            (node("a", cluster=gpus(2, 24), gpus=2), node("b", cluster=gpus(1, 24), gpus=2)), {},
            "b has 1 GPU, and the run is to use 2 there", "gpus = 1 for b in the hosts file, or --gpus 1",
        ),
    ],
)  # fmt: skip
def test_a_node_that_cannot_take_part_is_named(
    facts: tuple[NodeFacts, ...], words: dict[str, Any], message: str, advice: str
) -> None:
    with pytest.raises(RunError) as caught:
        require_agreement(facts, **words)
    assert (caught.value.message, caught.value.try_) == (message, advice)


def test_a_slow_answer_is_no_wrong_clock() -> None:
    require_agreement((A, node("b", clock=1000.0)), asked=[(999.0, 1001.0), (1000.0, 1200.0)])
    require_agreement((A, node("b", clock=1200.0)), asked=[(999.0, 1001.0), (1000.0, 1200.0)])


@pytest.mark.parametrize(
    ("holders", "resume", "message", "advice"),
    [
        (
            (node("b", run_id=RUN),), False,
            "runs/x on b holds a run", "--resume with the same --run, or another --run",
        ),
        (
            (node("a", run_id=RUN), node("b", run_id="fedcba98ff")), True,
            "runs/x on b holds another run (of id fedcba98) than on a (01234567)",
            "another --run, or move that of b away",
        ),
        ((), True, "no node has a run in runs/x to go on with", "leave --resume out"),
    ],
)  # fmt: skip
def test_nodes_hold_one_run_or_none(holders: tuple[NodeFacts, ...], resume: bool, message: str, advice: str) -> None:
    require_one_run((node("a", run_id=RUN), node("c", run_id=RUN)), going=False, resume=True, run="runs/x")
    with pytest.raises(RunError) as caught:
        require_one_run(holders, going=False, resume=resume, run="runs/x")
    assert (caught.value.message, caught.value.try_) == (message, advice)


def prepared(name: str, **words: str) -> PreparedFacts:
    return msgspec.structs.replace(
        PreparedFacts(node="abcd".index(name), name=name, weights="aaaabbbbcccc", data="ddddeeeeffff"), **words
    )


@pytest.mark.parametrize(
    ("other", "message", "advice"),
    [
        (
            prepared("b", weights="9999888877"),
            "b has other packed weights (99998888) than a (aaaabbbb): m is likely another one there, or was "
            "packed on another kind of device",
            "copy the model from a to b, or name one that both see",
        ),
        (
            prepared("b", data="9999888877"),
            "b has other data (99998888) than a (ddddeeee): d.jsonl is likely not the same there",
            "copy it from a to b, or name one that both see",
        ),
        (prepared("b", error="no room in /cache", try_="make room"), "b: no room in /cache", "make room"),
    ],
)
def test_what_one_node_prepared_differently_is_told(other: PreparedFacts, message: str, advice: str) -> None:
    require_same_prepared([prepared("a"), prepared("c")])
    with pytest.raises(RunError) as caught:
        require_same_prepared([prepared("a"), other, prepared("c")], model="m", data="d.jsonl")
    assert (caught.value.message, caught.value.try_) == (message, advice)
