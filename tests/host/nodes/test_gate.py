"""Does a gate let in who knows the token and nobody else, and what can strangers do to it?"""

import random
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from qdist.core.errors import RunError
from qdist.host.nodes import door as door_module
from qdist.host.nodes.door import Door, WrongToken, connect, owner_of
from qdist.host.nodes.gate import Gate
from qdist.host.nodes.wire import Wire
from qdist.host.nodes.words import Ask, Reply

TOKEN = "0123456789abcdef"
HERE = "127.0.0.1"


@pytest.fixture
def store() -> Iterator[tuple[str, int]]:
    """Answers every connection with what it sends, in capitals."""
    listener = socket.create_server((HERE, 0), backlog=64)
    thread = threading.Thread(target=echo, args=(listener,))
    thread.start()
    yield listener.getsockname()
    listener.shutdown(socket.SHUT_RDWR)
    thread.join()
    listener.close()


def echo(listener: socket.socket) -> None:
    threads = []
    while True:
        try:
            sock, _ = listener.accept()
        except OSError:
            break
        threads.append(threading.Thread(target=capitals, args=(sock,)))
        threads[-1].start()
    for thread in threads:
        thread.join()


def capitals(sock: socket.socket) -> None:
    with sock:
        while data := sock.recv(1 << 16):
            sock.sendall(data.upper())


@pytest.fixture
def said() -> list[str]:
    return []


@pytest.fixture
def gate(store: tuple[str, int], tmp_path: Path, said: list[str]) -> Iterator[Gate]:
    who = {"run": "r1", "name": "node-a"}
    with Gate((HERE, 0), TOKEN, store=store, folder=tmp_path, who=who, say=said.append) as gate:
        yield gate


def exactly(sock: socket.socket, count: int) -> bytes:
    found = b""
    while len(found) < count:
        data = sock.recv(count - len(found))
        assert data, "closed too early"
        found += data
    return found


def test_connections_of_a_door_lead_to_the_store(gate: Gate) -> None:
    data = random.Random(1).randbytes(3_000_000).lower()
    with Door((HERE, gate.port), TOKEN) as door:
        assert door.reached == 0.0
        with socket.create_connection((HERE, door.port)) as one, socket.create_connection((HERE, door.port)) as two:
            two.sendall(b"abc")
            sender = threading.Thread(target=one.sendall, args=(data,))
            sender.start()
            assert exactly(one, len(data)) == data.upper()
            assert exactly(two, 3) == b"ABC"
            sender.join()
            assert 0 < door.reached <= time.monotonic()
            assert door.problem == ""


def test_an_end_at_one_side_is_an_end_at_the_other(gate: Gate) -> None:
    with Door((HERE, gate.port), TOKEN) as door, socket.create_connection((HERE, door.port)) as sock:
        sock.sendall(b"a")
        assert exactly(sock, 1) == b"A"
        door.close()
        assert sock.recv(1) == b""
    with Door((HERE, gate.port), TOKEN) as door, socket.create_connection((HERE, door.port)) as sock:
        sock.sendall(b"a")
        assert exactly(sock, 1) == b"A"
        gate.close()
        assert sock.recv(1) == b""


def test_a_wrong_token_is_told_to_both_sides_and_once_to_the_user(gate: Gate, said: list[str]) -> None:
    for _ in range(3):
        with pytest.raises(WrongToken, match=f"{HERE}:{gate.port} has another token than this node"):
            connect((HERE, gate.port), "another token of some length")
    assert said == [f"{HERE} was not let in to the run: its token is wrong"]
    with Door((HERE, gate.port), "another token of some length") as door:
        with socket.create_connection((HERE, door.port)) as sock:
            assert sock.recv(1) == b""
        assert "another token" in door.problem
        assert door.reached == 0.0


def test_a_gate_that_does_not_know_the_token_is_not_believed(tmp_path: Path) -> None:
    def pretend() -> None:
        sock, _ = listener.accept()
        with sock:
            sock.sendall(b"qdist-gate " + b"a" * 32 + b"\n")
            sock.recv(200)
            sock.sendall(b"b" * 64 + b"\n")
            sock.recv(1)

    with socket.create_server((HERE, 0)) as listener:
        thread = threading.Thread(target=pretend)
        thread.start()
        with pytest.raises(WrongToken):
            connect((HERE, listener.getsockname()[1]), TOKEN)
        thread.join()


def test_hello_says_who_is_there(gate: Gate) -> None:
    with connect((HERE, gate.port), TOKEN) as sock:
        wire = Wire(sock)
        wire.send(Ask("hello"))
        assert wire.receive(Reply) == Reply(run="r1", name="node-a")


def test_a_node_without_a_store_says_so(tmp_path: Path) -> None:
    with Gate((HERE, 0), TOKEN, store=None, folder=tmp_path) as gate, Door((HERE, gate.port), TOKEN) as door:
        with socket.create_connection((HERE, door.port)) as sock:
            assert sock.recv(1) == b""
        assert door.problem == "this node does not serve the store"


def test_a_gate_serves_the_store_that_it_is_given_later(store: tuple[str, int], tmp_path: Path) -> None:
    with Gate((HERE, 0), TOKEN, store=None, folder=tmp_path) as gate, Door((HERE, gate.port), TOKEN) as door:
        gate.store = store
        with socket.create_connection((HERE, door.port)) as sock:
            sock.sendall(b"x")
            assert exactly(sock, 1) == b"X"


def test_a_port_in_use_and_a_foreign_address_are_named(gate: Gate, tmp_path: Path) -> None:
    with pytest.raises(RunError, match=f"port {gate.port} of {HERE} is in use") as caught:
        Gate((HERE, gate.port), TOKEN, store=None, folder=tmp_path)
    assert str(gate.port + 1) in caught.value.try_
    with pytest.raises(RunError, match=r"192\.0\.2\.7 \(port 29400\) is not an address of this machine"):
        Gate(("192.0.2.7", 29400), TOKEN, store=None, folder=tmp_path)
    with pytest.raises(RunError, match="is not a known host"):
        Gate(("host.invalid", 29400), TOKEN, store=None, folder=tmp_path)


@pytest.mark.parametrize("address", ["", "0", "0.0.0.0", "::"])
def test_a_gate_never_listens_on_all_addresses(tmp_path: Path, address: str) -> None:
    with pytest.raises(RunError, match="every address of this machine"):
        Gate((address, 0), TOKEN, store=None, folder=tmp_path)


def test_nobody_there_and_somebody_else_there_are_told_apart() -> None:
    with socket.create_server((HERE, 0)) as listener:
        port = listener.getsockname()[1]
        with pytest.raises(RunError, match=f"{HERE}:{port} does not answer within 0.05 s"):
            connect((HERE, port), TOKEN, timeout=0.05)
        thread = threading.Thread(target=answer_as_a_web_server, args=(listener,))
        thread.start()
        with pytest.raises(RunError, match=f"what listens at {HERE}:{port} is not a run"):
            connect((HERE, port), TOKEN)
        thread.join()
    with pytest.raises(RunError, match=f"nothing listens at {HERE}:{port}"):
        connect((HERE, port), TOKEN)


def answer_as_a_web_server(listener: socket.socket) -> None:
    for _ in range(2):  # the first is of the caller that did not wait
        sock, _ = listener.accept()
        with sock:
            sock.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")


def test_strangers_bytes_do_a_gate_no_harm(
    gate: Gate, said: list[str], capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    draw = random.Random(7)
    for number in range(1000):
        with socket.create_connection((HERE, gate.port)) as sock:
            if number % 3 == 0:
                sock.sendall(strange(draw) + b"\n" * (number % 2))
            else:
                with connect((HERE, gate.port), TOKEN) as known:
                    known.sendall(strange(draw) + b"\n" * (number % 2))
    with Door((HERE, gate.port), TOKEN) as door, socket.create_connection((HERE, door.port)) as sock:
        sock.sendall(b"still there")
        assert exactly(sock, 11) == b"STILL THERE"
    assert capfd.readouterr() == ("", "")
    assert caplog.records == []


def strange(draw: random.Random) -> bytes:
    """Noise, or a request with parts that are wrong."""
    nonce, path = b"%032x" % draw.getrandbits(128), draw.choice(["../x", "/etc/passwd", "a\0b", "a//b", "", "a" * 5000])
    verb = draw.choice(["get", "put", "append", "list", "publish", "store", "hello", "rm"])
    number = draw.choice([-1, 0, 5, 1 << 62, 1 << 70])
    return draw.choice([
        draw.randbytes(draw.randrange(9000)),
        nonce + b" " + b"0" * 64,
        f'{{"verb":"{verb}","path":"{path}","offset":{number},"size":{draw.choice([-1, 0, 3])}}}'.encode(),
        f'{{"verb":"{verb}","path":{number}}}'.encode(),
        b"[" * 4000,
    ])  # fmt: skip


def test_only_processes_of_this_user_go_through_a_door(gate: Gate, monkeypatch: pytest.MonkeyPatch) -> None:
    with Door((HERE, gate.port), TOKEN) as door:
        monkeypatch.setattr(door_module, "owner_of", lambda sock: 65534)
        with socket.create_connection((HERE, door.port)) as sock:
            assert sock.recv(1) == b""


def test_the_owner_of_a_connection_is_found_in_the_kernels_table(tmp_path: Path) -> None:
    with socket.create_server((HERE, 0)) as listener, socket.create_connection(listener.getsockname()) as one:
        sock, _ = listener.accept()
        with sock:
            here, there = one.getsockname()[1], sock.getsockname()[1]
            line = "  1: 0100007F:{:04X} 0100007F:{:04X} {} 00000000:00000000 00:00000000 00000000 {}  0 1\n"
            table = tmp_path / "tcp"
            table.write_text("  sl\n" + line.format(there, here, "01", 1) + line.format(here, there, "01", 1234))
            assert owner_of(sock, tables=[table, tmp_path / "none"]) == 1234
            table.write_text("  sl\n" + line.format(here, there, "06", 0))
            assert owner_of(sock, tables=[table, tmp_path / "none"]) is None, "one that is closed has no owner any more"
            assert owner_of(sock) is not None


def test_a_door_also_opens_to_sockets_of_ipv6_as_torch_makes_them(gate: Gate) -> None:
    with Door((HERE, gate.port), TOKEN) as door, socket.socket(socket.AF_INET6) as sock:
        sock.connect((f"::ffff:{HERE}", door.port))
        sock.sendall(b"x")
        assert exactly(sock, 1) == b"X"
