"""Does a run start on the hosts of a file only if all can take part, and is the one that cannot named?"""

import os
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest

from qdist.core.errors import QdistError, RunError
from qdist.core.nodes.hosts import Host
from qdist.core.nodes.job import NodeJob
from qdist.core.spec.run_spec import resolve
from qdist.host.files import locked
from qdist.host.nodes.addresses import addresses_of, own_place
from qdist.host.nodes.asked import Asked
from qdist.host.nodes.launching import jobs_of, on_hosts, party_of, previewed
from qdist.host.run.presence import lock_of
from qdist.host.run.rundir import RunDir
from tests.host.nodes.fakes import starts

TWO = '[[host]]\nname = "a"\naddress = "127.0.0.1"\n[[host]]\nname = "b"\naddress = "127.0.0.2"\n'
SETTINGS = {"model": "smollm2-135m", "load_format": "dummy", "steps": 5}


@pytest.fixture
def asked(bed: Path, monkeypatch: pytest.MonkeyPatch) -> Asked:
    monkeypatch.setenv("QDIST_CACHE", str(bed / "cache"))
    (bed / "hosts.toml").write_text(TWO)
    return Asked(bed / "run", SETTINGS, resume=False)


def file(asked: Asked) -> str:
    return str(asked.run.parent / "hosts.toml")


def launched(asked: Asked) -> list[str]:
    """What is said by a launch whose agents finish at once."""
    said: list[str] = []
    with on_hosts(party_of(file(asked)), asked, say=said.append, agent="fake_agent") as agents, agents:
        assert agents.wait() == 0
    return said


def test_all_hosts_are_asked_and_an_agent_is_started_on_each(asked: Asked) -> None:
    said = launched(asked)
    assert [line.partition(",")[0] for line in said] == ["host     a: 1 CPU rank", "host     b: 1 CPU rank"]
    assert len(starts(asked.run.parent, "a")) == len(starts(asked.run.parent, "b")) == 1
    assert "token" not in (asked.run.parent / "ssh.log").read_text()


def test_every_host_gets_its_own_job(asked: Asked) -> None:
    (asked.run.parent / "hosts.toml").write_text("port = 4000\nrejoin_seconds = 9\n" + TWO + "gpus = 3\n")
    first, second = jobs_of(party_of(file(asked)), asked, "secret")
    assert first.endpoints == second.endpoints == ("127.0.0.1:4000", "127.0.0.2:4000")
    assert (first.node, first.name, first.attached, first.gpus) == (0, "a", True, None)
    assert (second.node, second.name, second.attached, second.gpus) == (1, "b", False, 3)
    assert (second.least, second.most, second.rejoin_s, second.token) == (1, 2, 9.0, "secret")


def refusal(asked: Asked) -> str:
    with pytest.raises(QdistError) as caught:
        launched(asked)
    assert starts(asked.run.parent, "a") == []
    return str(caught.value)


def of_another_run(asked: Asked) -> None:
    (asked.run / "plan.json").write_text("{}")
    (asked.run / "run_id").write_text("0123456789")


def without_python(asked: Asked) -> None:
    (asked.run.parent / "hosts.toml").write_text(TWO + 'python = "/none/python"\n')


def out_of_reach(asked: Asked) -> None:
    (asked.run.parent / "down").write_text("ssh: connect to host b port 22: Connection timed out\n")


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (out_of_reach, "b cannot be reached by ssh: ssh: connect to host b port 22: Connection timed out"),
        (without_python, "b has no /none/python"),
        (of_another_run, "on a holds a run"),
    ],
)
def test_a_host_that_cannot_take_part_is_named_before_anything_starts(
    spoil: Callable[[Asked], None], words: str, asked: Asked
) -> None:
    spoil(asked)
    assert words in refusal(asked)


def test_an_agent_of_an_earlier_launch_is_told_with_how_it_is_stopped(asked: Asked) -> None:
    with locked(lock_of(RunDir(asked.run), 1)):
        told = refusal(asked)
    assert f"an agent of an earlier launch is at work in {asked.run} on b" in told
    assert f"try: on b: qdist stop {asked.run}" in told


def test_several_that_fail_are_told_with_the_first(asked: Asked) -> None:
    three = TWO + '[[host]]\nname = "c"\naddress = "127.0.0.3"\n'
    (asked.run.parent / "hosts.toml").write_text(three)
    out_of_reach(asked)
    assert "(and c cannot take part either)" in refusal(asked)


def test_a_preview_plans_for_all_hosts_and_writes_nothing(asked: Asked) -> None:
    job = previewed(party_of(file(asked)), asked, say=lambda _: None).job
    assert job is not None
    assert job.plan.world_size == 2
    assert os.listdir(asked.run) == []


@pytest.mark.parametrize(
    ("hosts", "message"),
    [
        (("a 127.0.0.1", "b 198.51.100.1"), "a means 127.0.0.1 here, where no other host reaches it"),
        (("a 198.51.100.1", "b 198.51.100.1"), "a and b in f are one machine: 198.51.100.1"),
        (("a 198.51.100.1", "b 198.51.100.2"), "is none of the hosts in f: a, b"),
    ],
)
def test_addresses_that_cannot_be_are_told(hosts: tuple[str, ...], message: str) -> None:
    named = [Host(name=name, address=address) for name, address in map(str.split, hosts)]
    with pytest.raises(RunError, match=message):
        own_place(named, addresses_of(named, where="f"), where="f")


def test_a_name_of_ssh_alone_means_what_ssh_says(bed: Path) -> None:
    assert addresses_of([Host(name="no-such-name.invalid")], where="f") == ("127.0.0.9",)


def test_what_an_agent_gets_is_the_recipe_and_a_run_of_its_own_path(asked: Asked) -> None:
    (job, _) = jobs_of(party_of(file(asked)), asked, "secret")
    read = msgspec.json.decode(msgspec.json.encode(job), type=NodeJob)
    assert resolve(read.settings).steps == 5
    assert read.run == str(asked.run)
