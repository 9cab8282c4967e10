"""The hosts that tests of several machines run on: apart where hosts are apart, and gone afterwards."""

import os
import select
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.nodes.bed import Bed, why_not

pytestmark = pytest.mark.skipif(bool(why_not()), reason=why_not() or "hosts can be made")
SSH = ("ssh", "-o", "BatchMode=yes", "-o", "ConnectTimeout=1")
_PINGS = """
import socket, sys, time
address, count = (sys.argv[1], 7777), int(sys.argv[2])
if count == 0:
    server = socket.create_server(address)
    print("ready", flush=True)
    link, _ = server.accept()
    while taken := link.recv(1 << 16):
        link.sendall(taken)
else:
    with socket.create_connection(address, timeout=5) as link:
        begun = time.monotonic()
        for _ in range(count):
            link.sendall(b"x")
            link.recv(1)
        print((time.monotonic() - begun) / count)
"""


@pytest.fixture
def bed(tmp_path: Path) -> Iterator[Bed]:
    with Bed(tmp_path / "bed", ["ash", "birch"], own=[tmp_path / "own"], environ={"birch": {"WHERE": "here"}}) as made:
        yield made


def test_each_host_is_reached_by_ssh_under_its_name_and_address(bed: Bed):
    ash, birch = bed.hosts.values()
    assert ash.done(*SSH, "birch", "hostname; echo $WHERE; echo $HOME") == f"birch\nhere\n{birch.folder}/home\n"
    assert ash.done(*SSH, birch.address, "hostname") == "birch\n"
    assert birch.done(*SSH, "ash", "hostname") == "ash\n"


def test_an_own_folder_is_its_hosts_alone_and_others_are_shared(bed: Bed, tmp_path: Path):
    ash, birch = bed.hosts.values()
    for host in (ash, birch):
        host.done("sh", "-c", f"hostname > {tmp_path}/own/name; hostname >> {tmp_path}/names")
    assert [host.disk(tmp_path / "own/name").read_text() for host in (ash, birch)] == ["ash\n", "birch\n"]
    assert not (tmp_path / "own/name").exists()
    assert ash.disk(tmp_path / "names").read_text() == "ash\nbirch\n"


def test_a_full_disk_is_full_on_one_host(bed: Bed, tmp_path: Path):
    ash, birch = bed.hosts.values()
    birch.fill(tmp_path / "own/run", 1 << 20)
    write = ("dd", "if=/dev/zero", f"of={tmp_path}/own/run/large", "bs=1M", "count=2")
    assert "No space left" in birch.run(write).stderr
    ash.done("mkdir", tmp_path / "own/run")
    ash.done(*write)


def test_a_killed_host_has_no_process_left_and_can_boot(bed: Bed):
    ash, birch = bed.hosts.values()
    sleeps = birch.popen(["sleep", "1000"])
    birch.done("true")
    assert birch.processes() == ["sleep 1000"]
    birch.kill()
    assert sleeps.wait(10) == -signal.SIGKILL
    assert birch.processes() == []
    assert "refused" in ash.run([*SSH, "birch", "true"]).stderr
    birch.boot()
    ash.done(*SSH, "birch", "true")


def test_a_stopped_host_does_not_answer_until_it_goes_on(bed: Bed):
    ash, birch = bed.hosts.values()
    echo = birch.popen(["cat"])
    birch.stop()
    assert "timed out" in ash.run([*SSH, "birch", "true"]).stderr
    birch.cont()
    assert echo.communicate("still here\n", timeout=10)[0] == "still here\n"
    ash.done(*SSH, "birch", "true")


def test_a_cut_host_is_out_of_reach_until_it_is_mended(bed: Bed):
    ash, birch = bed.hosts.values()
    birch.cut()
    assert ash.run([*SSH, "birch", "true"]).returncode == 255
    birch.mend()
    ash.done("ssh", "-o", "ConnectTimeout=10", "birch", "true")


@pytest.mark.parametrize("seconds", [0.0, 0.02])
def test_packets_take_as_long_as_they_are_delayed_and_are_counted(bed: Bed, seconds: float):
    ash, birch = bed.hosts.values()
    bed.limit(125e6)
    if seconds:
        bed.delay(seconds)
    server = birch.popen([sys.executable, "-c", _PINGS, birch.address, "0"])
    assert server.stdout is not None
    assert server.stdout.readline() == "ready\n"
    before = bed.traffic()
    assert float(ash.done(sys.executable, "-c", _PINGS, birch.address, "5")) >= 2 * seconds
    after = bed.traffic()
    assert after["ash"].sent - before["ash"].sent >= 5 * (1 + 20 + 20 + 14)
    assert after["ash"].received > before["ash"].received
    bed.limit(None)


def test_nothing_is_left_of_hosts_whose_builder_was_killed(tmp_path: Path):
    script = (
        "import sys; from pathlib import Path; from tests.nodes.bed import Bed\n"
        "with Bed(Path(sys.argv[1]), ['oak', 'elm']) as bed:\n"
        "    bed.delay(0.001)\n"
        "    bed.hosts['oak'].popen(['sleep', '1000'])\n"
        "    print(bed.hosts['oak'].keeper, flush=True)\n"
        "    sys.stdin.read()\n"
    )
    folder = tmp_path / "bed"
    with subprocess.Popen(
        [sys.executable, "-c", script, str(folder)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as builder:
        assert builder.stdout is not None
        keeper = int(builder.stdout.readline())
        gone = os.pidfd_open(keeper)
        builder.kill()
    assert select.select([gone], [], [], 10)[0]
    os.close(gone)
