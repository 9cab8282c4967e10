"""Runs a part of qdist on another host through the user's own ssh, and tells why where that fails."""

import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

import msgspec

from qdist.core.errors import JobError, MachineError, QdistError, RunError
from qdist.core.nodes.hosts import Host
from qdist.core.nodes.job import STILL_THERE, AgentLine, NodeJob
from qdist.core.text import quoted
from qdist.host import children
from qdist.host.nodes.agents import AGENT, UNREACHED, started
from qdist.host.run.state import find_reason

T = TypeVar("T")
ASKED_S = 20.0
"""Seconds that a host gets to answer a question."""
_OPTIONS = ("BatchMode=yes", "ConnectTimeout=10", "ServerAliveInterval=5", "ServerAliveCountMax=3")
"""Nothing is asked on the terminal; a connection that is dead ends within 20 s. All else is as ssh is configured."""
_ROOT = Path(__file__).resolve().parents[3]
_MISSING = (126, 127)
"""Exit codes of a shell that cannot run a program, and that finds none."""
_NO_MODULE = re.compile(r"No module named '([\w.]+)'")


class Ssh:
    """Another host. The agent there outlives its connection."""

    here = False

    def __init__(self, host: Host, *, module: str = AGENT) -> None:
        self._host, self._module = host, module

    def start(self, job: NodeJob, errors: int, before: int | None) -> "subprocess.Popen[bytes]":
        """Start an agent, unless the one before is still there."""
        command = ssh_command(self._host, script(self._host, self._module, before=before))
        return started(command, job, errors, begin=children.ending_with_this())

    def kill(self, process: "subprocess.Popen[bytes] | None", there: int | None) -> "subprocess.Popen[bytes] | None":
        """End the connection, and the agent through a new one; its ranks end with it."""
        if process is not None and process.poll() is None:
            process.kill()
        if there is None:
            return None
        command = ssh_command(self._host, f"{_runs(self._module, there)} && kill -9 {there}")
        null = subprocess.DEVNULL
        return subprocess.Popen(command, stdin=null, stdout=null, stderr=null, start_new_session=True)

    def explain(self, code: int, errors: Sequence[str]) -> QdistError:
        """What ssh said last, or the reason in the agent's last lines."""
        return explain(self._host, code, errors)


def ssh_command(host: Host, command: str) -> list[str]:
    """The command line of one ssh process that runs a shell command on a host."""
    options = [word for option in _OPTIONS for word in ("-o", option)]
    return ["ssh", "-T", *options, *_chosen(host), "--", host.name, quoted("/bin/sh", "-c", command)]


def _chosen(host: Host) -> tuple[str, ...]:
    """The user and the port that the file gives a host."""
    return (*(("-l", host.user) if host.user else ()), *(("-p", str(host.port)) if host.port else ()))


def _typed(host: Host, *words: str, program: str = "ssh") -> str:
    """What a person types to log in to a host as this does, or to run words there."""
    port = ("-p", str(host.port)) if host.port else ()
    return quoted(program, *port, f"{host.user}@{host.name}" if host.user else host.name, *words)


def script(host: Host, module: str, *, before: int | None = None) -> str:
    """Shell commands that become a module of qdist, in this process's working directory where the host has it.

    They tell its process id first. before: process id of an agent; where it still runs, nothing is started.
    """
    root, lines = quoted(_ROOT), []
    if before is not None:
        lines.append(f"if {_runs(module, before)}; then echo qdist agent {before}; exit {STILL_THERE}; fi")
    lines.append(f"cd {quoted(os.getcwd())} 2>/dev/null")
    if (_ROOT / "pyproject.toml").is_file():
        path = f"PYTHONPATH={root}${{PYTHONPATH:+:$PYTHONPATH}}; export PYTHONPATH"
        lines.append(f"if [ -f {root}/qdist/__init__.py ]; then {path}; fi")
    python = _path_for_shell(host.python or sys.executable)
    # On one line: csh, as the login shell there, ends a quoted text at the end of its line.
    return "; ".join((*lines, "echo qdist agent $$", f"exec {python} -u -P -m {module}"))


def _path_for_shell(path: str) -> str:
    """A path as a shell on a host takes it; ~/ is the home of the user there."""
    return '"$HOME"/' + quoted(path.removeprefix("~/")) if path.startswith("~/") else quoted(path)


def _runs(module: str, process: int) -> str:
    """A shell command that succeeds if a process is a Python that runs a module."""
    return f"grep -qs {module} /proc/{process}/cmdline"


def command_of(host: Host, module: str, *, here: bool) -> list[str]:
    """The command line that runs a module of qdist on a host, or on this machine as there."""
    commands = script(host, module)
    return ["/bin/sh", "-c", commands] if here else ssh_command(host, commands)


def ask(host: Host, module: str, words: msgspec.Struct, *, here: bool = False, timeout_s: float = ASKED_S) -> bytes:
    """What a module of qdist prints on a host that gets these words on a line of its standard input.

    Raises RunError or MachineError, naming the host, if it cannot be reached or ends with an error.
    """
    command = command_of(host, module, here=here)
    # A master connection that ssh leaves in the background keeps the standard error open: it is no pipe.
    with tempfile.TemporaryFile() as errors:
        try:
            done = subprocess.run(
                command, input=msgspec.json.encode(words) + b"\n", stdout=subprocess.PIPE, stderr=errors,
                timeout=timeout_s, check=False,
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            raise RunError(f"{host.name} has not answered within {timeout_s:g} s", try_=_typed(host, "true")) from None
        except FileNotFoundError:
            raise MachineError("there is no ssh on this machine", try_="install openssh-client") from None
        if done.returncode == 0:
            return done.stdout
        errors.seek(0)
        raise explain(host, done.returncode, errors.read().decode(errors="replace").splitlines())


def read_answer(host: Host, printed: bytes, kind: type[T]) -> T:
    """What a module of qdist answered, among what a login shell may have printed besides.

    Raises RunError, naming the host, where it answered with an error or in other words than these.
    """
    line = next((line for line in reversed(printed.splitlines()) if line[:1] in (b"{", b'"')), b"")
    try:
        if b'"kind":"error"' in line:
            said = msgspec.json.decode(line, type=AgentLine)
            raise RunError(f"{host.name}: {said.text}", try_=said.try_)
        return msgspec.json.decode(line, type=kind)
    except msgspec.DecodeError:
        raise RunError(
            f"{host.name} does not answer as this qdist does", try_=f"the same version of qdist on {host.name} and here"
        ) from None


def explain(host: Host, code: int, errors: Sequence[str]) -> QdistError:
    """The error for a program on a host that ended without a word of its own. errors: its, or ssh's, last lines."""
    name, last = host.name, next((line.strip() for line in reversed(errors) if line.strip()), "")
    python = host.python or sys.executable
    if code == STILL_THERE:
        return JobError(f"the agent of {name} is at work, and its connection is broken", try_=_typed(host))
    if code == UNREACHED or code < 0:
        return _unreached(host, errors, last)
    if code in _MISSING:
        return MachineError(f"{name} has no {python}: {last}", try_=f'python = "PATH" of the host {name} in the file')
    if "No module named 'qdist'" in last:
        install = _typed(host, python, "-m", "pip", "install", "qdist")
        return MachineError(f"{python} on {name} has no qdist: {last}", try_=install)
    if "No module named 'qdist." in last:
        return MachineError(f"{name} has another qdist than this: {last}", try_=f"the same version on {name} and here")
    why = find_reason(errors) or last
    if missing := _NO_MODULE.search(why):
        return MachineError(
            f"{python} on {name} has no {missing[1]}, which qdist needs: {why}",
            try_=f'python = "PATH" of the host {name} in the file, of the environment where qdist is installed',
        )
    return JobError(f"{name} ended with exit code {code}" + (f": {why}" if why else ""), try_=_typed(host))


def _unreached(host: Host, errors: Sequence[str], last: str) -> QdistError:
    """The error for an ssh that ended with 255: what it says is the only thing that tells why."""
    name, said = host.name, "\n".join(errors)
    check = _typed(host, "true")
    if "IDENTIFICATION HAS CHANGED" in said:
        return RunError(f"{name} has another host key than ssh knows: {last}", try_=f"why it has, then {check}")
    if "Host key verification failed" in said:
        return RunError(f"ssh does not know the host key of {name}: {last}", try_=f"{check}, once, and compare the key")
    if "Permission denied" in said:
        return RunError(f"{name} refuses ssh's keys: {last}", try_=_typed(host, program="ssh-copy-id"))
    if not last:
        return RunError(f"the agent of {name} was killed, or its connection ended", try_=check)
    return RunError(f"{name} cannot be reached by ssh: {last}", try_=check)
