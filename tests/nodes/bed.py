"""Hosts as namespaces of one machine: each with its own network, disk, host name, processes and sshd.

A host is a set of namespaces that one process holds; a further one holds the switch between them. Nothing has a name
that outlives the process which built it: all of it ends with that process, however that ends.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import NamedTuple, Self, TypeVar

T = TypeVar("T")

NETWORK, FIRST = "10.77.0", 11
"""Hosts have addresses 10.77.0.11, 10.77.0.12, ..."""
CHECKOUT = Path(__file__).parents[2]
_TOOLS = ("ip", "tc", "nsenter", "unshare", "setpriv", "mount", "ssh", "ssh-keygen", "sshd")
_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
_HELD = "echo ready; while read -r _; do :; done"
"""What the first process of a host does: it takes in orphans, and ends with the pipe to it."""
_QUEUE_S = 0.02
"""Seconds of packets that a limited link holds back before it drops some."""


def why_not() -> str:
    """Why there can be no hosts here; empty where they can."""
    if sys.platform != "linux" or os.geteuid() != 0:
        return "namespaces as hosts need root on Linux"
    missing = [tool for tool in _TOOLS if not shutil.which(tool, path=_PATH)]
    if missing:
        return f"namespaces as hosts need {', '.join(missing)}"
    tried = subprocess.run(
        [
            "unshare",
            "-n",
            "-m",
            "-u",
            "-i",
            "-p",
            "-f",
            "sh",
            "-c",
            "ip link add probe0 type bridge && ip link add probe1 type veth",
        ],
        capture_output=True,
        text=True,
    )
    return "" if tried.returncode == 0 else f"no namespaces here: {tried.stderr.strip() or 'refused'}"


class Traffic(NamedTuple):
    """Bytes of a host's link since it is there, with their Ethernet headers."""

    sent: int
    received: int


class Host:
    """One of a bed's hosts."""

    def __init__(self, bed: "Bed", number: int, name: str, environ: Mapping[str, str], cores: Sequence[int]) -> None:
        self.name, self.address, self.port = name, f"{NETWORK}.{FIRST + number}", f"port{number}"
        self.folder, self._bed = bed.folder / name, bed
        self.environ = {
            "PATH": _PATH, "HOME": str(self.folder / "home"), "LANG": "C.UTF-8",
            "PYTHONPATH": str(CHECKOUT), "OMP_NUM_THREADS": "1", **environ,
        }  # fmt: skip
        self._cores = ["taskset", "-c", ",".join(map(str, cores))] if cores else []
        self._started: list[subprocess.Popen[str]] = []
        self.keeper = 0
        """Id of its first process, seen from outside."""

    def disk(self, path: Path) -> Path:
        """Where a file of the host is found from outside of it."""
        own = next((folder for folder in self._bed.own if path == folder or folder in path.parents), None)
        return path if own is None else self._disk(own) / path.relative_to(own)

    def popen(
        self, command: Sequence[str | Path], *, environ: Mapping[str, str] | None = None, log: Path | None = None
    ) -> subprocess.Popen[str]:
        """Start a command there. log: takes all that it says; otherwise it is said through pipes."""
        out = subprocess.PIPE if log is None else log.open("w")
        started = subprocess.Popen(
            [*self._bed.entered(self.keeper, "-n", "-m", "-u", "-i", "-p"), *self._cores, *map(str, command)],
            stdin=subprocess.PIPE,
            stdout=out,
            stderr=subprocess.PIPE if log is None else subprocess.STDOUT,
            env={**self.environ, **(environ or {})},
            text=True,
        )
        if not isinstance(out, int):
            out.close()
        self._started.append(started)
        return started

    def run(
        self, command: Sequence[str | Path], *, environ: Mapping[str, str] | None = None, timeout: float = 120
    ) -> subprocess.CompletedProcess[str]:
        """Run a command there to its end, however that is."""
        with self.popen(command, environ=environ) as started:
            try:
                out, err = started.communicate(timeout=timeout)
            except subprocess.TimeoutExpired:
                started.kill()
                raise
        return subprocess.CompletedProcess(started.args, started.returncode, out, err)

    def done(self, *command: str | Path) -> str:
        """What a command says that succeeds."""
        ended = self.run(command)
        if ended.returncode:
            raise OSError(f"{self.name}: {command} ended with {ended.returncode}: {ended.stderr}")
        return ended.stdout

    def kill(self) -> None:
        """End every process there at once, sshd included. Its kernel goes on, and closes their connections."""
        self._signal(signal.SIGKILL)

    def boot(self) -> None:
        """Start what runs on a host by itself: sshd."""
        self.done(
            shutil.which("sshd", path=_PATH) or "sshd", "-f", self.folder / "sshd_config", "-E", self.folder / "sshd"
        )

    def stop(self) -> None:
        """Stop every process there; its kernel still answers for them."""
        self._signal(signal.SIGSTOP)

    def cont(self) -> None:
        """Let them go on."""
        self._signal(signal.SIGCONT)
        for started in self._started:
            started.send_signal(signal.SIGCONT)  # nsenter stops with its child, and does not go on with it

    def cut(self) -> None:
        """Pull its cable out: nothing is said to either side."""
        self._bed.switch("ip", "link", "set", self.port, "down")

    def mend(self) -> None:
        """Put it in again."""
        self._bed.switch("ip", "link", "set", self.port, "up")

    def fill(self, path: Path, size: int) -> None:
        """Put a small disk of its own over a path there."""
        self.done("mkdir", "-p", path)
        self.done("mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", path)

    def processes(self) -> list[str]:
        """Command lines of what runs there, without sshd that waits for connections."""
        inside = os.readlink(f"/proc/{self.keeper}/ns/pid")
        found = []
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                if int(folder.name) == self.keeper or os.readlink(folder / "ns/pid") != inside:
                    continue
                words = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
            except OSError:
                continue
            if words and "[listener]" not in words:
                found.append(words)
        return found

    def build(self, stack: ExitStack) -> None:
        """Make its namespaces, its link to the switch, its disks and its sshd."""
        for folder in (self.folder / "home/.ssh", *map(self._disk, self._bed.own)):
            folder.mkdir(parents=True)
        self._write_files()
        stack.callback(self._forget)
        self.keeper = self._bed.held(stack, "--net", "--mount", "--uts", "--ipc", "--pid", "--mount-proc")
        self._bed.switch(
            "ip", "link", "add", self.port, "type", "veth", "peer", "name", "eth0", "netns", str(self.keeper)
        )
        self._bed.switch("ip", "link", "set", self.port, "master", "switch", "up")
        script = [
            f"hostname {self.name}", "ip link set lo up", "ip link set eth0 up",
            f"ip address add {self.address}/24 dev eth0",
            "sysctl -q -w net.ipv4.tcp_congestion_control=cubic || true",
            "mount -t tmpfs tmpfs /run", "mkdir /run/sshd", "mount -t tmpfs tmpfs /dev/shm",
            *(f"mount --bind {self.folder / name} /etc/{name}" for name in ("passwd", "hosts")),
            *(f"mount --bind {self._disk(path)} {path}" for path in self._bed.own),
        ]  # fmt: skip
        self.done("sh", "-ec", "; ".join(script))
        self.boot()

    def _forget(self) -> None:
        for started in self._started:
            _end(started)

    def _disk(self, path: Path) -> Path:
        return self.folder / "disk" / str(path).lstrip("/").replace("/", "_")

    def _write_files(self) -> None:
        """Names, the home of the user there, keys and configuration of ssh."""
        users = Path("/etc/passwd").read_text().splitlines()
        users = [
            ":".join((*u.split(":")[:5], self.environ["HOME"], "/bin/sh")) if u.split(":")[2] == "0" else u
            for u in users
        ]
        (self.folder / "passwd").write_text("\n".join(users) + "\n")
        names = "".join(f"{host.address} {host.name}\n" for host in self._bed.hosts.values())
        (self.folder / "hosts").write_text(f"127.0.0.1 localhost\n{names}")
        keys, mine = self._bed.folder / "keys", self.folder / "home/.ssh"
        for key in ("id_ed25519", "id_ed25519.pub"):
            shutil.copy(keys / key, mine / key)
        shutil.copy(keys / "id_ed25519.pub", mine / "authorized_keys")
        shutil.copy(keys / "host", self.folder / "host_key")
        public = " ".join((keys / "host.pub").read_text().split()[:2])
        known = (f"{host.name},{host.address} {public}\n" for host in self._bed.hosts.values())
        (mine / "known_hosts").write_text("".join(known))
        passed = " ".join(f'"{name}={value}"' for name, value in self.environ.items() if name not in ("PATH", "HOME"))
        (self.folder / "sshd_config").write_text(
            f"ListenAddress {self.address}\nHostKey {self.folder / 'host_key'}\nPidFile none\nUsePAM no\n"
            f"StrictModes no\nPasswordAuthentication no\nPermitRootLogin yes\nSetEnv {passed}\n"
        )

    def _signal(self, number: signal.Signals) -> None:
        """To every process there but the first, at once: `kill -1` spares that and itself."""
        command = [
            *self._bed.entered(self.keeper, "-p", "-m"),
            "kill",
            f"-{number.name.removeprefix('SIG')}",
            "--",
            "-1",
        ]
        subprocess.run(command, check=True, env=self.environ)


class Bed:
    """Hosts beside each other at a switch, with an ssh that lets each into every other.

    folder: for all that the hosts keep; absolute. own: folders of which each host has one of its own at that path; all
    else is shared. environ: variables of every command on a host, by its name; those of "" are all hosts'. cores: of
    each host, which may lack the machine's others.
    """

    def __init__(
        self,
        folder: Path,
        names: Sequence[str],
        *,
        own: Sequence[Path] = (),
        environ: Mapping[str, Mapping[str, str]] | None = None,
        cores: Sequence[Sequence[int]] = (),
    ) -> None:
        self.folder, self.own, given = folder, tuple(own), environ or {}
        self.hosts = {
            name: Host(self, number, name, {**given.get("", {}), **given.get(name, {})}, cores[number] if cores else ())
            for number, name in enumerate(names)
        }
        self._stack, self._switch = ExitStack(), 0
        self._relay: subprocess.Popen[str] | None = None

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            self._make_keys()
            for path in self.own:
                path.mkdir(parents=True, exist_ok=True)
            self._switch = self.held(stack, "--net", "--pid")
            self.switch("ip", "link", "add", "switch", "type", "bridge")
            self.switch("ip", "link", "set", "switch", "up")
            for host in self.hosts.values():
                host.build(stack)
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    def limit(self, bytes_s: float | None) -> None:
        """Bytes/s of every link, each way; None for no limit."""
        rate = [] if bytes_s is None else _rate(bytes_s)
        for host in self.hosts.values():
            for where, device in ((host.done, "eth0"), (self.switch, host.port)):
                if rate:
                    where("tc", "qdisc", "replace", "dev", device, "root", *rate)
                else:
                    where("tc", "qdisc", "del", "dev", device, "root")

    def delay(self, seconds: float) -> None:
        """Seconds that each packet takes from host to host: a process in the switch's place holds it that long."""
        ports = [host.port for host in self.hosts.values()]
        command = [sys.executable, str(Path(__file__).with_name("relay.py")), str(seconds), *ports]
        self._relay = subprocess.Popen(
            ["setpriv", "--pdeathsig", "KILL", *self.entered(self._switch, "-n"), *command],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self._stack.callback(_end, self._relay)
        for port in ports:
            self.switch("ip", "link", "set", port, "nomaster")
        if self._relay.stdout is None or self._relay.stdout.readline() != "ready\n":
            raise OSError("the relay that delays packets did not start")

    def traffic(self) -> dict[str, Traffic]:
        """Bytes that each host has sent and received, by its name."""
        links = {link["ifname"]: link["stats64"] for link in json.loads(self.switch("ip", "-s", "-j", "link"))}
        return {
            name: Traffic(sent=links[host.port]["rx"]["bytes"], received=links[host.port]["tx"]["bytes"])
            for name, host in self.hosts.items()
        }

    def switch(self, *command: str | Path) -> str:
        """What a command in the switch says that succeeds."""
        ran = subprocess.run([*self.entered(self._switch, "-n"), *map(str, command)], capture_output=True, text=True)
        if ran.returncode:
            raise OSError(f"{command} ended with {ran.returncode}: {ran.stderr}")
        return ran.stdout

    @staticmethod
    def entered(keeper: int, *kinds: str) -> list[str]:
        """The start of a command in namespaces of these kinds."""
        return ["nsenter", "-t", str(keeper), *kinds, "--"]

    @staticmethod
    def held(stack: ExitStack, *kinds: str) -> int:
        """Id of a process that holds new namespaces until the stack is closed or this process ends."""
        command = ["setpriv", "--pdeathsig", "KILL", "unshare", *kinds, "--fork", "--kill-child", "bash", "-c", _HELD]
        holder = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        stack.callback(_end, holder)
        if holder.stdout is None or holder.stdout.readline() != "ready\n":
            raise OSError(f"no namespaces: {command} ended with {holder.wait()}")
        return int(Path(f"/proc/{holder.pid}/task/{holder.pid}/children").read_text())

    def _make_keys(self) -> None:
        keys = self.folder / "keys"
        keys.mkdir(parents=True)
        for name in ("id_ed25519", "host"):
            subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", keys / name], check=True)


def wait_for(found: Callable[[], T], *, seconds: float, what: str) -> T:
    """The first answer that is true; TimeoutError, saying what was waited for, where there is none in time."""
    end = time.monotonic() + seconds
    while not (answer := found()):
        if time.monotonic() > end:
            raise TimeoutError(f"no {what.removeprefix('a ').removeprefix('an ')} within {seconds:g} s")
        time.sleep(0.05)
    return answer


def _rate(bytes_s: float) -> list[str]:
    burst = int(max(bytes_s / 1000, 80_000))
    limit = int(bytes_s * _QUEUE_S) + burst
    return ["tbf", "rate", f"{int(bytes_s * 8)}bit", "burst", str(burst), "limit", str(limit)]


def _end(process: subprocess.Popen[str]) -> None:
    with process:
        process.kill()
