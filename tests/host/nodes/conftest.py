"""Hosts without ssh: a program of that name that runs its command here, and a folder for a run."""

import os
import sys
from pathlib import Path

import pytest

FAKE_SSH = """#!/bin/sh
if [ "$1" = -G ]; then echo "hostname 127.0.0.9"; exit; fi
echo "$@" >> "$FAKE_SSH_LOG"
if [ -f "$FAKE_SSH_DOWN" ]; then cat "$FAKE_SSH_DOWN" >&2; exit 255; fi
for last; do :; done
eval "exec $last"
"""


@pytest.fixture
def bed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run directory, with an ssh on PATH that runs its command here and a module `fake_agent` to be found."""
    (tmp_path / "bin").mkdir()
    ssh = tmp_path / "bin/ssh"
    ssh.write_text(FAKE_SSH)
    ssh.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    monkeypatch.setenv("FAKE_SSH_LOG", str(tmp_path / "ssh.log"))
    monkeypatch.setenv("FAKE_SSH_DOWN", str(tmp_path / "down"))
    monkeypatch.setenv("PYTHONPATH", ":".join((str(Path(__file__).parent), *filter(None, sys.path))))
    (tmp_path / "run").mkdir()
    return tmp_path
