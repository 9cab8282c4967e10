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
from qdist.core.requests import Generate
from qdist.host import children
from qdist.host.tasks import handed_over
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


def asked(folder: Path, answer: str, *, request: str = "Gather(run='r')") -> tuple[list[str], dict[str, str]]:
    """A program that asks for a job, in whose process `answer` is the code of the job, and its environment.

    It prints what it was answered.
    """
    (folder / "sitecustomize.py").write_text(
        "import sys\nfrom types import ModuleType, SimpleNamespace\n"
        "if 'qdist.runtime.tasks' in sys.orig_argv:\n"
        "    job, transformers, utils = map(ModuleType, ('job', 'transformers', 'transformers.utils'))\n"
        "    utils.logging = SimpleNamespace(disable_progress_bar=lambda: None, set_verbosity_error=lambda: None)\n"
        f"    exec({answer!r}, job.__dict__)\n"
        "    for name in ('infer.chat', 'train.result', 'exports.merge'): sys.modules[f'qdist.runtime.{name}'] = job\n"
        "    sys.modules |= {'transformers': transformers, 'transformers.utils': utils}\n"
    )
    code = (
        "from qdist.core.errors import QdistError\nfrom qdist.core.requests import *\n"
        "from qdist.host.tasks import run_task\n"
        f"try:\n    print('answered', run_task({request}))\n"
        "except (QdistError, KeyboardInterrupt) as error:\n    print(type(error).__name__, error, sep=': ')"
    )
    return [sys.executable, "-c", code], {**os.environ, "PYTHONPATH": os.pathsep.join([str(folder), *sys.path])}


@pytest.mark.parametrize(
    ("request_", "said"),
    [
        ("Gather(run='r')", ""),
        ("Merge(runs=('r',), out='o')", "the same command goes on from what is written"),
    ],
)
def test_ctrl_c_ends_both_and_leaves_no_traceback(request_: str, said: str, tmp_path: Path) -> None:
    note = tmp_path / "pid"
    asleep = "def run(request): " + ASLEEP.replace("sys.argv[1]", repr(str(note)))
    command, environment = asked(tmp_path, asleep, request=request_)
    with subprocess.Popen(
        command, start_new_session=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment, text=True,
        preexec_fn=hears_signals,
    ) as parent:  # fmt: skip
        until(lambda: note.is_file() and bool(note.read_text()))
        os.killpg(parent.pid, signal.SIGINT)
        told, complained = parent.communicate(timeout=30)
    assert (told, complained, parent.returncode) == (f"KeyboardInterrupt: {said}\n", "", 0)
    assert not alive(int(note.read_text()))


def test_ctrl_c_while_the_child_starts_leaves_no_traceback_either(tmp_path: Path) -> None:
    """Its interpreter stops in a module that Python imports before any other, and is interrupted there."""
    note = tmp_path / "pid"
    wait = f"import os, time\nopen({str(note)!r}, 'w').write('here')\n"
    wait += f"while not os.path.exists({str(tmp_path / 'go')!r}): time.sleep(0.01)\n"
    unused = f"def run(request): open({str(tmp_path / 'unused')!r}, 'w')"
    command, environment = asked(tmp_path, wait + unused)
    with subprocess.Popen(
        command, start_new_session=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment, text=True,
        preexec_fn=hears_signals,
    ) as parent:  # fmt: skip
        until(note.is_file)
        os.killpg(parent.pid, signal.SIGINT)
        (tmp_path / "go").touch()
        said, complained = parent.communicate(timeout=30)
    assert (said, complained, parent.returncode) == ("KeyboardInterrupt: \n", "", 0)
    assert not (tmp_path / "unused").exists()


@pytest.mark.parametrize(("asks", "heard"), [(False, ""), (True, "y")])
def test_only_a_program_that_asks_hears_what_is_typed(asks: bool, heard: str, tmp_path: Path) -> None:
    code = f"import os\nfrom qdist.host import children\nchildren.run({LISTENS!r}, os.environ, asks={asks})"
    done = subprocess.run([sys.executable, "-c", code], input="y", capture_output=True, text=True, check=True)
    assert done.stdout == f"heard {heard!r}\n"


def test_a_program_that_alone_was_interrupted_counts_as_stopped() -> None:
    with pytest.raises(KeyboardInterrupt):
        children.run([sys.executable, "-c", "raise SystemExit(130)"], os.environ)


DISK = (
    "a disk cannot be written to (full: file)\n  try: make room there, then the same command again, or `qdist launch "
)
KILLED = (
    "the process that was at work was killed by SIGKILL, which is what Linux does to a process when memory runs out"
)
AGAIN = "\n  try: the same command again"


@pytest.mark.parametrize(
    ("job", "said", "complained"),
    [
        ("print(request)", "Gather(run='r', checkpoint='last', out=None)\nanswered None\n", ""),
        ("raise errors.RunError('no', try_='yes')", "RunError: no\n  try: yes\n", ""),
        ("raise errors.JobError('no', try_='yes')", "JobError: no\n  try: yes\n", ""),
        ("raise hints.TooBigError('too big')", "PlanError: too big\n", ""),
        ("raise OSError(28, 'full', 'file')", f"JobError: {DISK}--resume` of a run\n", ""),
        (
            "raise ZeroDivisionError",
            f"JobError: the process that was at work ended with exit code 1{AGAIN}; what it said is above\n",
            "ZeroDivisionError\n",
        ),
        ("os.kill(os.getpid(), 9)", f"JobError: {KILLED}{AGAIN}\n", ""),
        ("sys.exit(130)", "KeyboardInterrupt: \n", ""),
        ("sys.exit(141)", "", ""),
    ],
)
def test_what_a_process_came_to_reaches_who_asked_and_it_prints_no_error_itself(
    job: str, said: str, complained: str, tmp_path: Path
) -> None:
    imports = "import os, sys\nfrom qdist.core import errors\nfrom qdist.core.spec import suggest as hints"
    code = f"{imports}\ndef run(request): {job}"
    command, environment = asked(tmp_path, code)
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert (done.stdout, done.stderr[-len(complained) :] if complained else done.stderr) == (said, complained)


@pytest.mark.parametrize(("kind", "heard"), [("Gather", ""), ("Chat", "y")])
def test_only_a_job_that_asks_hears_what_is_typed(kind: str, heard: str, tmp_path: Path) -> None:
    job = "import sys\ndef run(request): print(f'heard {sys.stdin.read()!r}')"
    command, environment = asked(tmp_path, job, request=f"{kind}(run='r')")
    done = subprocess.run(command, env=environment, input="y", capture_output=True, text=True, check=True)
    assert done.stdout == f"heard {heard!r}\nanswered None\n"


SHADOWS = ("json", "torch", "transformers", "numpy", "msgspec", "qdist", "sitecustomize", "encodings", "re", "click")


def test_nothing_of_the_working_directory_is_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model folder may hold a torch.py; and PYTHONPATH an empty entry, which stands for that folder."""
    for name in SHADOWS:
        (tmp_path / f"{name}.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'a').write({name!r})")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", os.environ.get("PYTHONPATH", "") + ":")
    (tmp_path / "inner").mkdir()
    code = "import json, re, click, msgspec, qdist.host.tasks, qdist.runtime.tasks as tasks; tasks.quiet()"
    with handed_over(Generate(run="r", prompts="p", out="o")) as task:
        assert children.run([*task.command[:2], "-c", code], children.environment()) == 0
    assert not (tmp_path / "ran").exists()


def test_a_child_whose_parent_died_before_it_could_ask_the_kernel_ends_by_itself() -> None:
    code = "from qdist.host.children import end_with_parent; end_with_parent(1 << 22); print('went on')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (128 + signal.SIGTERM, "")


FINISHES = (
    "import signal, sys; "
    "signal.signal(signal.SIGTERM, lambda *_: sys.exit(open(sys.argv[1], 'a').write('done') and 7)); "
    "open(sys.argv[1], 'w').write('ready '); signal.pause()"
)


def test_sigterm_is_passed_on_to_a_program_that_finishes_by_itself(tmp_path: Path) -> None:
    note, code = (
        tmp_path / "note",
        (
            "import os, sys; from qdist.host import children; "
            "sys.exit(children.run(sys.argv[1:], os.environ, passes_on_sigterm=True))"
        ),
    )
    words = [sys.executable, "-c", code, sys.executable, "-c", FINISHES, str(note)]
    parent = subprocess.Popen(words, preexec_fn=hears_signals)
    until(lambda: note.exists() and note.read_text() == "ready ")
    parent.terminate()
    assert parent.wait(30) == 7
    assert note.read_text() == "ready done"
