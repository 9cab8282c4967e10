"""Is every way in which another host cannot be used told in a sentence that names it?"""

import sys
from pathlib import Path

import pytest

from qdist.core.nodes.hosts import Host
from qdist.host.nodes.ssh import explain, script, ssh_command

PYTHON = "/opt/python"
B = Host(name="b", python=PYTHON)


@pytest.mark.parametrize(
    ("code", "last", "message", "advice"),
    [
        (
            255, "ssh: connect to host b port 22: No route to host",
            "b cannot be reached by ssh: ssh: connect to host b port 22: No route to host", "ssh b true",
        ),
        (
            255, "me@b: Permission denied (publickey).",
            "b refuses ssh's keys: me@b: Permission denied (publickey).", "ssh-copy-id b",
        ),
        (
            255, "Host key verification failed.",
            "ssh does not know the host key of b: Host key verification failed.",
            "ssh b true, once, and compare the key",
        ),
        (
            255, "@  WARNING: REMOTE HOST IDENTIFICATION HAS CHANGED!  @\nHost key verification failed.",
            "b has another host key than ssh knows: Host key verification failed.", "why it has, then ssh b true",
        ),
        (255, "", "the agent of b was killed, or its connection ended", "ssh b true"),
        (
            127, "/bin/sh: 1: exec: /opt/python: not found",
            "b has no /opt/python: /bin/sh: 1: exec: /opt/python: not found",
            'python = "PATH" of the host b in the file',
        ),
        (
            1, "/opt/python: Error while finding module specification (ModuleNotFoundError: No module named 'qdist')",
            "/opt/python on b has no qdist: /opt/python: Error while finding module specification "
            "(ModuleNotFoundError: No module named 'qdist')",
            "ssh b /opt/python -m pip install qdist",
        ),
        (
            1, "/opt/python: No module named 'qdist.host.nodes'",
            "b has another qdist than this: /opt/python: No module named 'qdist.host.nodes'",
            "the same version on b and here",
        ),
        (
            1, "Traceback\nModuleNotFoundError: No module named 'msgspec'",
            "/opt/python on b has no msgspec, which qdist needs: ModuleNotFoundError: No module named 'msgspec'",
            'python = "PATH" of the host b in the file, of the environment where qdist is installed',
        ),
        (1, "Traceback\nValueError: a bug", "b ended with exit code 1: ValueError: a bug", "ssh b"),
    ],
)  # fmt: skip
def test_what_ended_it_is_told(code: int, last: str, message: str, advice: str) -> None:
    error = explain(B, code, last.splitlines())
    assert (error.message, error.try_) == (message, advice)


@pytest.mark.parametrize(
    ("code", "last", "advice"),
    [
        (255, "me@b: Permission denied (publickey).", "ssh-copy-id -p 2222 me@b"),
        (255, "No route to host", "ssh -p 2222 me@b true"),
        (1, "ValueError: a bug", "ssh -p 2222 me@b"),
    ],
)
def test_what_to_try_logs_in_with_the_user_and_port_of_the_file(code: int, last: str, advice: str) -> None:
    assert explain(Host(name="b", user="me", port=2222), code, [last]).try_ == advice


def test_an_interpreter_in_the_home_there_is_found_by_the_shell_there() -> None:
    commands = script(Host(name="b", python="~/my venv/bin/python"), "some.module").split("; ")
    assert commands[-1] == "exec \"$HOME\"/'my venv/bin/python' -u -P -m some.module"


def test_a_login_shell_that_quotes_single_lines_alone_can_start_the_module() -> None:
    assert "\n" not in script(Host(name="b"), "some.module", before=12)


def test_ssh_is_used_as_it_is_configured() -> None:
    command = ssh_command(Host(name="b", user="me", port=2222), "true")
    assert command[command.index("-l") :] == ["-l", "me", "-p", "2222", "--", "b", "/bin/sh -c true"]
    assert not [word for word in command if "HostKey" in word]


def test_the_shell_of_a_host_becomes_the_module_in_the_same_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a folder").mkdir()
    monkeypatch.chdir(tmp_path / "a folder")
    lines = script(Host(name="b"), "some.module").split("; ")
    assert f"cd '{tmp_path / 'a folder'}' 2>/dev/null" in lines
    assert lines[-1] == f"exec {sys.executable} -u -P -m some.module"
