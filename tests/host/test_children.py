"""Does a program that is run here end with this one, and is it told how it ended?"""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from qdist.core.errors import RunError
from qdist.host import children
from qdist.host.launch.tasks import run_module
from tests.signals import hears_signals

PARENT = "import os, sys; from qdist.host import children; children.run(sys.argv[1:], os.environ)"
ASLEEP = "import os, sys, time; open(sys.argv[1], 'w').write(str(os.getpid())); time.sleep(60)"


LISTENS = [sys.executable, "-c", "import sys; print(f'heard {sys.stdin.read()!r}')"]


def until(met: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not met():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def alive(pid: int) -> bool:
    """A process that nobody has waited for yet is none."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_a_program_gives_its_exit_code() -> None:
    assert children.run([sys.executable, "-c", "raise SystemExit(3)"], os.environ) == 3


@pytest.mark.parametrize(
    ("name", "words"), [("SIGKILL", "killed by SIGKILL, which is what Linux does"), ("SIGTERM", "killed by SIGTERM")]
)
def test_a_program_that_a_signal_killed_is_an_error_in_words(name: str, words: str) -> None:
    code = f"import os, signal; os.kill(os.getpid(), signal.{name})"
    with pytest.raises(RunError, match=rf"the process that was at work was {words}.*\n?.*try: the same command again"):
        children.run([sys.executable, "-c", code], os.environ)


@pytest.mark.skipif(sys.platform != "linux", reason="Linux tells a process that its parent has died")
@pytest.mark.parametrize("force", [signal.SIGKILL, signal.SIGTERM, signal.SIGHUP])
def test_a_program_does_not_outlive_who_runs_it(tmp_path: Path, force: signal.Signals) -> None:
    note = tmp_path / "pid"
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT, sys.executable, "-c", ASLEEP, str(note)], preexec_fn=hears_signals
    )
    until(lambda: note.is_file() and bool(note.read_text()))
    child = int(note.read_text())
    assert alive(child)
    parent.send_signal(force)
    parent.wait(30)
    until(lambda: not alive(child))


def test_ctrl_c_ends_both_and_leaves_no_traceback(tmp_path: Path) -> None:
    note = tmp_path / "pid"
    (tmp_path / "asleep.py").write_text(ASLEEP)
    runner = [sys.executable, "-m", "qdist.runtime.child", "asleep", str(note)]
    imports, _, run = PARENT.rpartition("; ")
    code = f"{imports}\ntry:\n    {run}\nexcept KeyboardInterrupt:\n    print('stopped')"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path])}
    with subprocess.Popen(
        [sys.executable, "-c", code, *runner], start_new_session=True, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, env=environment, text=True, preexec_fn=hears_signals,
    ) as parent:  # fmt: skip
        until(lambda: note.is_file() and bool(note.read_text()))
        os.killpg(parent.pid, signal.SIGINT)
        said, complained = parent.communicate(timeout=30)
    assert (said, complained, parent.returncode) == ("stopped\n", "", 0)
    assert not alive(int(note.read_text()))


def test_ctrl_c_while_the_child_starts_leaves_no_traceback_either(tmp_path: Path) -> None:
    """Its interpreter stops in a module that Python imports before any other, and is interrupted there."""
    note = tmp_path / "pid"
    (tmp_path / "sitecustomize.py").write_text(
        "import os, sys, time\n"
        "if 'qdist.runtime.child' in sys.orig_argv:\n"
        f"    open({str(note)!r}, 'w').write('here')\n"
        f"    while not os.path.exists({str(tmp_path / 'go')!r}): time.sleep(0.01)"
    )
    (tmp_path / "asleep.py").write_text(ASLEEP)
    run = "children.run([sys.executable, '-m', 'qdist.runtime.child', 'asleep', 'unused'], os.environ)"
    imports = "import os, sys; from qdist.host import children"
    code = f"{imports}\ntry:\n    {run}\nexcept KeyboardInterrupt:\n    print('stopped')"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path])}
    with subprocess.Popen(
        [sys.executable, "-c", code], start_new_session=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        env=environment, text=True, preexec_fn=hears_signals,
    ) as parent:  # fmt: skip
        until(note.is_file)
        os.killpg(parent.pid, signal.SIGINT)
        (tmp_path / "go").touch()
        said, complained = parent.communicate(timeout=30)
    assert (said, complained, parent.returncode) == ("stopped\n", "", 0)
    assert not (tmp_path / "unused").exists()


@pytest.mark.parametrize(("asks", "heard"), [(False, ""), (True, "y")])
def test_only_a_program_that_asks_hears_what_is_typed(asks: bool, heard: str, tmp_path: Path) -> None:
    code = f"import os\nfrom qdist.host import children\nchildren.run({LISTENS!r}, os.environ, asks={asks})"
    done = subprocess.run([sys.executable, "-c", code], input="y", capture_output=True, text=True, check=True)
    assert done.stdout == f"heard {heard!r}\n"


def test_a_program_that_alone_was_interrupted_counts_as_stopped() -> None:
    with pytest.raises(KeyboardInterrupt):
        children.run([sys.executable, "-c", "raise SystemExit(130)"], os.environ)


def test_a_module_runs_with_its_own_arguments(tmp_path: Path) -> None:
    (tmp_path / "speaks.py").write_text("import sys\nprint(__name__, sys.argv[1:])")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path])}
    done = subprocess.run(
        [sys.executable, "-m", "qdist.runtime.child", "speaks", "a", "--b"], env=environment, capture_output=True,
        text=True, check=True,
    )  # fmt: skip
    assert done.stdout == "__main__ ['a', '--b']\n"


@pytest.mark.parametrize(("kind", "code"), [("RunError", 2), ("JobError", 1)])
def test_an_error_of_a_module_is_two_lines_and_its_exit_code(kind: str, code: int, tmp_path: Path) -> None:
    (tmp_path / "fails.py").write_text(f"from qdist.core.errors import {kind}\nraise {kind}('no', try_='yes')")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path])}
    done = subprocess.run(
        [sys.executable, "-m", "qdist.runtime.child", "fails"], env=environment, capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    assert (done.returncode, done.stdout, done.stderr) == (code, "", "error: no\n  try: yes\n")


SHADOWS = ("json", "torch", "transformers", "numpy", "msgspec", "qdist", "sitecustomize", "encodings", "re", "click")


def test_nothing_of_the_working_directory_is_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model folder may hold a torch.py; and PYTHONPATH an empty entry, which stands for that folder."""
    for name in SHADOWS:
        (tmp_path / f"{name}.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'a').write({name!r})")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", os.environ.get("PYTHONPATH", "") + ":")
    (tmp_path / "inner").mkdir()
    code = "import json, re, click, msgspec, qdist.host.launch.tasks"
    assert children.run([sys.executable, "-P", "-c", code], children.environment()) == 0
    assert run_module("json.tool", ["--help"]) == 0
    assert not (tmp_path / "ran").exists()


def test_a_child_whose_parent_died_before_it_could_ask_the_kernel_ends_by_itself() -> None:
    code = "from qdist.host.children import end_with_parent; end_with_parent(1 << 22); print('went on')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (128 + signal.SIGTERM, "")
