"""How fast does a gate carry bytes, and how soon does a connection end whose link is down? Needs root for the latter.

python bench/gate.py
"""

import os
import socket
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

from qdist.host.nodes.door import Door, connect
from qdist.host.nodes.gate import Gate
from qdist.host.nodes.remote import Files

TOKEN, HERE, TOTAL = "0123456789abcdef", "127.0.0.1", 2 << 30
LINK = ("ip link add gate-a type veth peer name gate-b", "ip addr add 10.99.0.1/24 dev gate-a", "ip link set gate-a up")


def measure_splice(folder: Path) -> None:
    """2 GiB through a door and a gate, both of this process; beside it the same over one plain connection."""
    with (
        socket.create_server((HERE, 0)) as sink,
        Gate((HERE, 0), TOKEN, store=sink.getsockname(), folder=folder) as gate,
        Door((HERE, gate.port), TOKEN) as door,
    ):
        report("door and gate", *pour(sink, (HERE, door.port)))
        report("plain", *pour(sink, sink.getsockname()))


def pour(sink: socket.socket, to: tuple[str, int]) -> tuple[float, float]:
    """Seconds by the clock, and of processors."""
    thread = threading.Thread(target=swallow, args=(sink,))
    thread.start()
    began, used = time.perf_counter(), time.process_time()
    with socket.create_connection(to) as sock:
        block = bytes(1 << 20)
        for _ in range(TOTAL >> 20):
            sock.sendall(block)
    thread.join()
    return time.perf_counter() - began, time.process_time() - used


def swallow(sink: socket.socket) -> None:
    """Read one connection to its end."""
    sock, _ = sink.accept()
    buffer = bytearray(1 << 20)
    with sock:
        while sock.recv_into(buffer):
            pass


def report(name: str, seconds: float, processor_s: float) -> None:
    """Print one measurement."""
    print(f"{name}: {TOTAL / seconds / 1e6:,.0f} MB/s, {processor_s / TOTAL * 1e9:.2f} s of processor per GB")


def measure_files(folder: Path) -> None:
    """1 GiB read and written, and what one request and one connection cost."""
    with Gate((HERE, 0), TOKEN, store=None, folder=folder) as gate:
        files = Files((HERE, gate.port), TOKEN)
        (folder / "large").write_bytes(bytes(1 << 30))
        for name, work in (
            ("get", lambda: files.fetch("large", folder / "copy")),
            ("put, flushed", lambda: files.put("copy", folder / "large")),
        ):
            began = time.perf_counter()
            work()
            print(f"{name}: {(1 << 30) / (time.perf_counter() - began) / 1e6:,.0f} MB/s")
        began = time.perf_counter()
        for _ in range(1000):
            files.append("events/rank001.jsonl", -1, b"")
        print(f"one request: {(time.perf_counter() - began) * 1e3:.0f} us")
        began = time.perf_counter()
        for _ in range(200):
            connect((HERE, gate.port), TOKEN).close()
        print(f"one proved connection: {(time.perf_counter() - began) * 5:.1f} ms")


def measure_dead_link(folder: Path) -> None:
    """Seconds until an idle and a busy connection end after the link goes down. Run in a network namespace."""
    peer = subprocess.Popen(["unshare", "-n", "sleep", "60"])
    wait_for_namespace(peer.pid)
    enter = ["nsenter", "-t", str(peer.pid), "-n"]
    for line in (*LINK, f"ip link set gate-b netns {peer.pid}"):
        subprocess.run(line.split(), check=True)
    for line in ("ip addr add 10.99.0.2/24 dev gate-b", "ip link set gate-b up", "ip link set lo up"):
        subprocess.run([*enter, *line.split()], check=True)
    far = subprocess.Popen(
        [*enter, sys.executable, __file__, "serve", str(folder)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert far.stdout
    endpoint = ("10.99.0.2", int(far.stdout.readline()))
    idle, busy = (connect(endpoint, TOKEN, timeout=60) for _ in range(2))
    subprocess.run(["ip", "link", "set", "gate-a", "down"], check=True)
    began = time.perf_counter()
    busy.sendall(b"{")
    for name, sock in (("busy", busy), ("idle", idle)):
        try:
            sock.recv(1)
        except OSError as error:
            print(f"{name} connection over a dead link: {time.perf_counter() - began:.1f} s, {error}")
    far.kill()
    peer.kill()


def wait_for_namespace(pid: int) -> None:
    """Return once a process has a network of its own."""
    while os.readlink(f"/proc/{pid}/ns/net") == os.readlink("/proc/self/ns/net"):
        time.sleep(0.01)


def serve(folder: Path) -> None:
    """A gate at the other end of the link."""
    with Gate(("10.99.0.2", 0), TOKEN, store=None, folder=folder) as gate:
        print(gate.port, flush=True)
        sys.stdin.read()


def main() -> None:
    """Measure all of it, or be one of the processes of `measure_dead_link`."""
    if len(sys.argv) == 3:
        {"serve": serve, "dead": measure_dead_link}[sys.argv[1]](Path(sys.argv[2]))
        return
    with tempfile.TemporaryDirectory() as folder:
        measure_splice(Path(folder))
        measure_files(Path(folder))
        subprocess.run(["unshare", "-n", sys.executable, __file__, "dead", folder], check=True)


if __name__ == "__main__":
    main()
