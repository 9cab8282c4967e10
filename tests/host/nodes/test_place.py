"""Does a machine find out who started a process, and by which address others reach it?"""

import socket
from pathlib import Path

import pytest

from qdist.core.errors import RunError
from qdist.core.nodes.places import NodeFlags, Place
from qdist.host.nodes.place import ancestors, meeting, place_here


def process(proc: Path, number: str, parent: str, name: str, *words: str) -> None:
    (proc / number).mkdir()
    (proc / number / "stat").write_text(f"{number} ({name}) S {parent} 1 1 0 -1")
    (proc / number / "cmdline").write_bytes(b"".join(word.encode() + b"\0" for word in words))


@pytest.fixture
def proc(tmp_path: Path) -> Path:
    """This process, started by a script under srun."""
    process(tmp_path, "self", "30", "qdist", "python3", "/bin/qdist", "launch")
    process(tmp_path, "30", "20", "run me) S 1.sh", "bash", "run.sh")
    process(tmp_path, "20", "1", "slurmstepd", "slurmstepd: [4123.0]")
    process(tmp_path, "1", "0", "systemd", "/sbin/init")
    return tmp_path


def place(node: int, rendezvous: str) -> Place:
    return Place(node, 2, 2, rendezvous, "--rendezvous")


def heard(said: list[str], node: int, rendezvous: str, patience_s: float = 0.0) -> tuple[str, str]:
    return meeting(place(node, rendezvous), say=said.append, patience_s=patience_s, wait=lambda _: None)


def test_ancestors_are_read_up_to_the_first_process(proc: Path) -> None:
    names = [{"run me) S 1.sh", "bash"}, {"slurmstepd"}, {"systemd", "init"}]
    assert ancestors(proc) == [frozenset(each) for each in names]


def test_ancestors_end_where_the_kernel_shows_no_more(proc: Path) -> None:
    (proc / "20/stat").unlink()
    assert len(ancestors(proc)) == 1


def test_this_process_has_ancestors() -> None:
    assert ancestors()


def test_a_process_under_srun_knows_its_node(proc: Path) -> None:
    environ = {
        "SLURM_JOB_ID": "7", "SLURM_STEP_ID": "0", "SLURM_NNODES": "2", "SLURM_NODEID": "1", "RANK": "3",
        "SLURM_JOB_NODELIST": "a[1-2]",
    }  # fmt: skip
    found, line = place_here(NodeFlags(), environ, proc=proc)
    assert found == Place(1, 2, 2, "a1:29407", "SLURM")
    assert line == "RANK of this shell is not obeyed: SLURM says which node this is"


def test_the_first_node_meets_on_its_own_address() -> None:
    assert heard([], 0, "127.0.0.1:29400") == ("127.0.0.1", "127.0.0.1:29400")


def test_nodes_on_one_machine_have_addresses_of_their_own() -> None:
    assert heard([], 1, "127.0.0.1:29400") == ("127.0.0.2", "127.0.0.1:29400")
    assert heard([], 299, "127.0.0.1:29400") == ("127.0.1.44", "127.0.0.1:29400")


def test_the_first_node_is_where_the_nodes_meet() -> None:
    with pytest.raises(RunError, match=r"192\.0\.2\.7:29400 is not on this machine, which is node 0|no route") as error:
        heard([], 0, "192.0.2.7:29400")
    assert error.value.try_


def test_a_name_that_is_not_known_is_waited_for_and_then_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(*_: object, **__: object) -> list[object]:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    said: list[str] = []
    with pytest.raises(RunError, match="head is not the name of a machine that is known here"):
        heard(said, 1, "head:29400", patience_s=3.0)
    assert said == ["waiting until head is known here, for 3 s at most"]


def test_a_name_that_is_loopback_here_is_of_no_use_to_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """As Debian writes it into /etc/hosts."""
    found = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.1.1", 29400))]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: found)
    with pytest.raises(RunError, match=r"desk is 127\.0\.1\.1 on this machine, where other"):
        heard([], 0, "desk:29400")
