"""Does a launch refuse what it must, write whole run directories, and say how its ranks ended?"""

import errno
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
from click.testing import CliRunner

import qdist
from qdist.cli.main import main
from qdist.core.errors import JobError, PlanError, QdistError, RunError, SpecError
from qdist.core.machine.calibration import Correction
from qdist.core.machine.cluster import Cluster, hypothetical, joined
from qdist.core.planning.plan import Plan, digest
from qdist.core.spec.run_spec import RunSpec, nest, resolve
from qdist.core.telemetry.events import Event, encode
from qdist.core.text import GIB
from qdist.host import children
from qdist.host.files import locked
from qdist.host.launch import claim, prepare, ranks
from qdist.host.launch.local import LocalRanks
from qdist.host.launch.prepare import Launch
from qdist.host.launch.survey import survey
from qdist.host.machine import probe
from qdist.host.run import calibration
from qdist.host.run.rundir import LOCK, RunDir
from qdist.host.run.state import state_of
from qdist.host.run.watchdog import Watchdog

SMALL = {"model": "smollm2-135m", "load_format": "dummy", "steps": 5, "seq_len": 64, "global_batch": 8, "gpus": 2}

pytestmark = pytest.mark.usefixtures("here")


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working folder on a machine without GPUs."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    return tmp_path


def spec(**settings: Any) -> RunSpec:
    return resolve(SMALL, {"run": "run"}, settings)


def job_with_script(script: str) -> Launch:
    """A written job whose ranks are a shell script."""
    job = prepare.prepare(spec())
    job = job._replace(files={**job.files, "launch.sh": f"cd run || exit 9\n{script}"})
    claim.write(job)
    return job._replace(resumes=digest(job.plan))


def started(
    job: Launch, show: Callable[[list[Event]], None] = lambda events: None, said: list[str] | None = None
) -> list[str]:
    """Run it to its end; what was said to the user."""
    said = [] if said is None else said
    with claim.claimed(job) as own:
        ranks.start(own, show=show, say=said.append)
    return said


def has_begun() -> bool:
    """Whether the script has said who it is, to the end."""
    return Path("run/pid").is_file() and Path("run/pid").read_text().endswith("\n")


def is_running(pid_file: str) -> bool:
    try:
        os.kill(int(Path(pid_file).read_text()), 0)
    except ProcessLookupError:
        return False
    return True


def test_the_rehearsal_knows_what_runs_here_have_taught(monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = resolve({"model": "llama-7b", "data": "demo", "placement": "replicate"})
    prepare._rehearse(prepare.Asked(RunDir("run"), wanted, hypothetical(1, 24 * GIB)), survey(wanted))
    monkeypatch.setattr(calibration, "correction_for", lambda *_, **__: Correction(context_bytes=23 * GIB))
    with pytest.raises(PlanError, match="llama-7b at 4 bits needs"):
        prepare._rehearse(prepare.Asked(RunDir("run"), wanted, hypothetical(1, 24 * GIB)), survey(wanted))


def test_preparing_random_weights_writes_nothing(here: Path) -> None:
    job = prepare.prepare(spec())
    assert list(here.iterdir()) == []
    assert (job.plan.world_size, job.plan.device, job.plan.data, job.plan.source.kind) == (2, "cpu", None, "dummy")
    assert list(job.files) == [
        "recipe.toml", "machine.json", "versions.json", "deepspeed.json", "accelerate.json", "launch.sh", "plan.json",
    ]  # fmt: skip


@pytest.mark.parametrize("way", ["prepare", "preview", "resume", "preview of a resume"])
def test_the_machine_is_probed_once_and_kept_as_it_was_planned_on(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    claim.write(prepare.prepare(spec(run="old")))
    probed = []

    def cluster() -> Cluster:
        probed.append(hypothetical(2, (20 + len(probed)) * GIB, name="NVIDIA H200"))
        return probed[-1]

    monkeypatch.setattr(probe, "cluster", cluster)
    old = RunDir(Path("old"))
    made = {
        "prepare": lambda: prepare.prepare(spec()),
        "preview": lambda: prepare.preview(spec()).job,
        "resume": lambda: prepare.prepare_resume(old, {}),
        "preview of a resume": lambda: prepare.preview_resume(old, {}).job,
    }[way]()
    assert made is not None
    assert len(probed) == 1
    assert msgspec.json.decode(made.files["machine.json"], type=Cluster) == probed[0]


def test_one_rank_gets_no_deepspeed_file() -> None:
    assert "deepspeed.json" not in prepare.prepare(spec(gpus=1)).files


def test_writing_leaves_every_file_and_the_plan_last() -> None:
    job = prepare.prepare(spec())
    claim.write(job)
    assert list(job.files)[-1] == "plan.json"
    times = {name: (job.run.path / name).stat().st_mtime_ns for name in job.files}
    assert max(times, key=lambda name: (times[name], name == "plan.json")) == "plan.json"
    assert {path.name for path in job.run.path.iterdir()} == {*job.files, "events", "logs", "checkpoints", ".lock"}
    assert job.run.plan() == job.plan


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        ({"run": None}, "runs/smollm2-135m-qlora-dummy"),
        ({"run": None, "model": "EleutherAI/pythia-160m"}, "runs/pythia-160m-qlora-dummy"),
        ({"run": "mine"}, "mine"),
    ],
)
def test_a_run_is_named_for_its_model_and_data(settings: dict[str, Any], name: str) -> None:
    assert str(prepare.prepare(spec(**settings)).run.path) == name


@pytest.mark.parametrize("model", ["llama-7b", "owner/unheard-of"])
def test_more_gpus_than_there_are_are_refused_before_anything_is_fetched(
    model: str, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("QDIST_CACHE", str(here / "cache"))
    monkeypatch.setattr(probe, "cluster", lambda: hypothetical(2, 80 * GIB))
    for plan in (prepare.prepare, prepare.preview):
        with pytest.raises(PlanError, match="--gpus 4, but this machine has 2"):
            plan(resolve({"model": model, "data": "demo", "gpus": 4}))
    assert list(here.iterdir()) == []


def test_a_run_without_a_name_finds_a_free_one(here: Path) -> None:
    (here / "runs/smollm2-135m-qlora-dummy").mkdir(parents=True)
    assert prepare.prepare(spec(run=None)).run.path.name == "smollm2-135m-qlora-dummy-2"


@pytest.mark.parametrize(
    ("settings", "message", "attempt"),
    [
        ({"model": ""}, "no model was named", "--model smollm2-135m"),
        ({"load_format": "auto"}, "no data was named", "--data FILE, a hub id, or --data demo"),
        ({"data": "demo"}, "random weights train on random tokens, not on 'demo'", "leave --data out"),
        ({"train": {"answers": 3}}, "need a tokenizer, and random weights have none", ""),
        ({"new_tokens": ["<x>"]}, "need a tokenizer, and random weights have none", ""),
        ({"steps": None}, "synthetic data have no epochs", "--set steps=20"),
    ],
)
def test_a_spec_that_lacks_something_is_refused(settings: dict[str, Any], message: str, attempt: str) -> None:
    with pytest.raises(SpecError, match=message) as caught:
        prepare.prepare(spec(**settings))
    assert caught.value.try_ == attempt


@pytest.mark.parametrize(
    ("files", "message", "attempt"),
    [
        (["plan.json", "result.json"], "run holds a finished run",
         "another --run, or more steps: qdist launch --resume --run run --steps N"),
        (["plan.json"], "run holds an unfinished run with no checkpoint yet",
         "qdist launch --resume --run run, or another --run"),
        (["plan.json", "checkpoints/step_000020/DONE", "checkpoints/step_000040/state.json"],
         "run holds an unfinished run with a checkpoint of step 20",
         "qdist launch --resume --run run, or another --run"),
        (["notes.txt"], "run exists and is not a run", "another --run"),
    ],
)  # fmt: skip
def test_a_directory_that_is_in_use_is_left_alone(files: list[str], message: str, attempt: str, here: Path) -> None:
    for name in files:
        (here / "run" / name).parent.mkdir(parents=True, exist_ok=True)
        (here / "run" / name).write_text("{}")
    with pytest.raises(RunError, match=message) as caught:
        prepare.prepare(spec())
    assert caught.value.try_ == attempt


def test_a_run_that_is_being_trained_is_watched_and_not_resumed() -> None:
    job = prepare.prepare(spec())
    claim.write(job)
    with locked(job.run.path / LOCK, busy=""), pytest.raises(RunError, match="is being trained") as caught:
        prepare.prepare(spec())
    assert caught.value.try_ == "qdist monitor run"


def test_a_directory_that_cannot_be_written_is_not_left_half_written(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: Path, content: str) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    monkeypatch.setattr(claim, "write_atomic", full)
    with pytest.raises(RunError, match="run cannot be written: No space left on device"):
        claim.write(prepare.prepare(spec()))
    assert not (here / "run").exists()


def test_a_file_is_no_run_directory(here: Path) -> None:
    (here / "run").touch()
    with pytest.raises(RunError, match="run exists and is not a run"):
        prepare.prepare(spec())


def test_an_empty_directory_may_become_a_run(here: Path) -> None:
    (here / "run").mkdir()
    prepare.prepare(spec())


@pytest.mark.parametrize(
    "changes",
    [
        {"gpus": 1},
        {"gpus": 4, "micro_batch": 2},
        {"zero.stage": 3},
        {"zero.offload": "cpu"},
        {"steps": 9},
        {"train.save_steps": 7, "train.keep": 1},
        {"liger": False},
        {"graphs": False},
        {"trackers": ["tensorboard"]},
        {"optim.lr": "0.0002"},
        {},
    ],
)
def test_a_resumed_run_may_change_what_no_step_computes(changes: dict[str, Any]) -> None:
    old = prepare.prepare(spec())
    claim.write(old)
    new = prepare.prepare_resume(old.run, nest(changes))
    assert new.plan.spec == resolve(msgspec.to_builtins(old.plan.spec), nest(changes))
    assert new.plan.source == old.plan.source
    claim.write(new)
    assert new.run.plan() == new.plan


def test_a_run_of_several_nodes_goes_on_with_this_machine_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    here = probe.cluster()
    with monkeypatch.context() as patched:
        patched.setattr(probe, "cluster", lambda: joined((here, here), ("a", "b"), (2, 2), None))
        old = prepare.prepare(spec())
    claim.write(old)
    new = prepare.prepare_resume(old.run, {})
    assert (old.plan.world.nodes, new.plan.world.nodes, new.plan.world_size) == ((2, 2), (), 2)
    assert new.plan.spec == old.plan.spec


@pytest.mark.parametrize(
    ("changes", "message", "attempt"),
    [
        ({"optim.lr": 1e-3}, r"run was started with optim.lr=0\.0002, not 0\.001; a resumed run keeps it",
         "leave optim.lr out, or start a new run"),
        ({"bits": 8}, "run was started with bits=4, not 8", "leave bits out, or start a new run"),
        ({"dtype": "float32"}, "run was started with dtype=auto, not \"float32\"",
         "leave dtype out, or start a new run"),
        ({"lora.r": 8}, "run was started with lora.r=64", "leave lora.r out, or start a new run"),
        ({"seed": 3}, "run was started with seed=0, not 3", "leave seed out, or start a new run"),
        ({"global_batch": 16}, "run was started with global_batch=8, not 16",
         "leave global_batch out, or start a new run"),
        ({"model": "llama-7b"}, 'run was started with model="smollm2-135m"', "leave model out, or start a new run"),
        ({"train.held_out": 0.2}, "run was started with train.held_out=0.1, not 0.2",
         "leave train.held_out out, or start a new run"),
    ],
)  # fmt: skip
def test_a_resumed_run_keeps_what_its_steps_compute(changes: dict[str, Any], message: str, attempt: str) -> None:
    job = prepare.prepare(spec())
    claim.write(job)
    with pytest.raises(SpecError, match=message) as caught:
        prepare.prepare_resume(job.run, nest(changes))
    assert caught.value.try_ == attempt


@pytest.mark.parametrize(
    ("result", "checkpoint", "changes", "message", "attempt"),
    [
        ("", 4, {"steps": 3}, "run has done 4 steps, more than 3", "qdist launch --resume --run run --steps 8"),
        ('{"steps": 5}', 5, {"steps": 5}, "run is finished after 5 steps: it can only go on to more steps, not to 5",
         "qdist launch --resume --run run --steps 10"),
        ('{"steps": 5}', 5, {"steps": 2}, "run is finished after 5 steps: it can only go on to more steps, not to 2",
         "qdist launch --resume --run run --steps 10"),
        ('{"steps": 5}', 5, {"train.keep": 1},
         "run is finished after 5 steps: it can only go on to more steps, not to 5",
         "qdist launch --resume --run run --steps 10"),
        ('{"steps": 5}', 0, {"steps": 9}, "run is finished after 5 steps, and no checkpoint of it is left to go on "
         "from", "a new run"),
    ],
)  # fmt: skip
def test_a_run_goes_on_to_more_steps_than_it_has_done(
    result: str, checkpoint: int, changes: dict[str, Any], message: str, attempt: str
) -> None:
    run = claim.write(prepare.prepare(spec()))
    if checkpoint:
        run.checkpoint(checkpoint).mkdir(parents=True)
        (run.checkpoint(checkpoint) / "DONE").touch()
    if result:
        Path("run/result.json").write_text(result)
    with pytest.raises(RunError) as caught:
        prepare.prepare_resume(run, nest(changes))
    assert (caught.value.message, caught.value.try_) == (message, attempt)


def test_a_run_that_ended_early_goes_on_only_with_more_patience() -> None:
    train = {"eval_steps": 1, "patience": 2}
    run = claim.write(prepare.prepare(spec(train=train, optim={"schedule": "linear"})))
    run.checkpoint(3).mkdir(parents=True)
    (run.checkpoint(3) / "DONE").touch()
    why = "stopped early at step 3 of 5: the held-out loss has not fallen for 2 evaluations (2 at step 1)"
    Path("run/result.json").write_text(json.dumps({"steps": 3, "ended_early": why}))
    with pytest.raises(RunError) as caught:
        prepare.prepare_resume(run, nest({"train.keep": 1}))
    assert caught.value.message == f"run {why}; with train.patience=2 it would end again at once"
    assert caught.value.try_ == "qdist launch --resume --run run --set train.patience=0"
    for patience in (0, 3):
        assert prepare.prepare_resume(run, nest({"train.patience": patience})).plan.spec.train.patience == patience


@pytest.mark.parametrize("changes", [{"steps": 9}, {"train.keep": 1}])
def test_a_run_with_a_decaying_learning_rate_keeps_its_length(changes: dict[str, Any]) -> None:
    run = claim.write(prepare.prepare(spec(optim={"schedule": "linear"})))
    run.checkpoint(5).mkdir(parents=True)
    (run.checkpoint(5) / "DONE").touch()
    Path("run/result.json").write_text('{"steps": 5}')
    why = "its linear learning rate ends with them" if "steps" in changes else "learning rate has ended with them"
    with pytest.raises(QdistError, match=why):
        prepare.prepare_resume(run, nest(changes))


def test_what_is_no_run_cannot_be_resumed() -> None:
    with pytest.raises(RunError, match=r"run is not a run: it has no plan\.json"):
        prepare.prepare_resume(RunDir("run"), {})


def test_a_run_that_ends_well_ends_quietly_and_shows_what_its_ranks_said() -> None:
    event = Event(kind="step", step=1, total_steps=5, loss=2.0)
    Path("event").write_bytes(encode(event))
    job = job_with_script("cat ../event > events/rank000.jsonl; echo '{\"steps\": 5}' > result.json")
    shown: list[Event] = []
    assert started(job, shown.extend) == []
    assert shown == [event]


def test_the_ranks_get_no_input_and_their_words_go_to_a_log(capfd: pytest.CaptureFixture[str]) -> None:
    job = job_with_script("cat; echo out; echo err >&2; echo '{}' > result.json")
    started(job)
    assert (job.run.logs / "launcher.log").read_text() == "out\nerr\n"
    assert capfd.readouterr() == ("", "")


def torchrun_failure(rank: int, exit_code: int, named: str) -> str:
    """What torch.distributed.run 2.13 prints when a rank of two dies: the other one is listed first."""
    return f"""W1123 01:26:02.182000 9322 torch/distributed/elastic/multiprocessing/api.py:1028] Sending process 9365
torch.distributed.elastic.multiprocessing.errors.ChildFailedError:
======================================================
qdist.runtime.train.worker FAILED
------------------------------------------------------
Failures:
[1]:
  time      : 2026-11-23_01:26:02
  host      : localhost
  rank      : {1 - rank} (local_rank: {1 - rank})
  exitcode  : -15 (pid: 9365)  (SIGTERM)
  error_file: <N/A>
  traceback : Signal 15 (SIGTERM) received by PID 9365
------------------------------------------------------
Root Cause (first observed failure):
[0]:
  time      : 2026-11-23_01:26:02
  host      : localhost
  rank      : {rank} (local_rank: {rank})
  exitcode  : {exit_code} (pid: 9366){named}
  error_file: <N/A>
  traceback : To enable traceback see: https://pytorch.org/docs/stable/elastic/errors.html
======================================================
"""


@pytest.mark.parametrize(
    ("exit_code", "named", "how"),
    [
        (1, "", "rank 1 ended with exit code 1"),
        (-9, "  (SIGKILL)", "rank 1 was killed by SIGKILL, which is what Linux does to a process when memory runs out"),
        (-11, "  (SIGSEGV)", "rank 1 was killed by SIGSEGV"),
    ],
)
@pytest.mark.parametrize("checkpoint", [False, True])
def test_a_dead_rank_is_named_with_its_last_words(exit_code: int, named: str, how: str, checkpoint: bool) -> None:
    Path("summary").write_text(torchrun_failure(1, exit_code, named))
    if checkpoint:
        done = "mkdir checkpoints/step_000020; touch checkpoints/step_000020/DONE"
    job = job_with_script(
        f"{done if checkpoint else ':'}\nseq 1 40 > logs/rank001.log; echo 'CUDA out of memory' >> logs/rank001.log\n"
        "echo innocent > logs/rank000.log; cat ../summary; exit 1"
    )
    with pytest.raises(RunError) as caught:
        started(job)
    lines = caught.value.message.splitlines()
    assert lines[:2] == [how, "the last lines of run/logs/rank001.log:"]
    assert lines[2:] == [*(f"  | {number}" for number in range(30, 41)), "  | CUDA out of memory"]
    assert caught.value.try_ == ("qdist launch --resume --run run" if checkpoint else "read run/logs/rank001.log")


@pytest.mark.parametrize(
    ("log", "why"),
    [
        ("[rank1]: Traceback (most recent call last):\n[rank1]: ValueError: bad sample", "ValueError: bad sample"),
        ("torch.distributed.DistBackendError: NCCL\nno details", "torch.distributed.DistBackendError: NCCL"),
        ("KeyError: caught\nerror: the loss is nan at step 2\n  try: a smaller optim.lr", "the loss is nan at step 2"),
    ],
)  # fmt: skip
def test_the_first_line_says_why_a_rank_left(log: str, why: str) -> None:
    Path("summary").write_text(torchrun_failure(1, 1, ""))
    Path("log").write_text(log)
    with pytest.raises(RunError) as caught:
        started(job_with_script("cp ../log logs/rank001.log; cat ../summary; exit 1"))
    assert caught.value.message.splitlines()[0] == f"rank 1 ended with exit code 1: {why}"


def test_what_an_earlier_launch_logged_is_no_word_of_this_one() -> None:
    Path("summary").write_text(torchrun_failure(1, -9, "  (SIGKILL)"))
    job = job_with_script("cat ../summary; exit 1")
    job.run.log_file(1).write_text("error: the loss is nan at step 2\n  try: a smaller optim.lr\n")
    with pytest.raises(RunError) as caught:
        started(job)
    assert caught.value.message.splitlines()[1:] == ["run/logs/rank001.log says nothing about it"]
    assert caught.value.try_ == "read run/logs/rank001.log"


def test_ranks_that_never_started_are_told_from_the_launchers_own_log() -> None:
    job = job_with_script("echo 'No module named torch' >&2; exit 3")
    (job.run.logs / "launcher.log").write_text(torchrun_failure(0, 1, ""))
    with pytest.raises(RunError) as caught:
        started(job)
    assert caught.value.message == "the ranks ended with exit code 3:\n  | No module named torch"
    assert caught.value.try_ == "read run/logs"


def test_a_dead_rank_without_a_log_is_still_named() -> None:
    Path("summary").write_text(torchrun_failure(0, 1, ""))
    with pytest.raises(RunError, match="rank 0 ended with exit code 1"):
        started(job_with_script("cat ../summary; exit 1"))


def test_ranks_that_leave_no_result_did_not_end_well() -> None:
    with pytest.raises(RunError, match="the ranks ended without finishing the run"):
        started(job_with_script("exit 0"))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_asks_the_ranks_to_stop_and_waits_for_them(number: signal.Signals) -> None:
    Path("event").write_bytes(encode(Event(kind="step", step=1, total_steps=5, loss=2.0)))
    job = job_with_script(
        "cat ../event > events/rank000.jsonl; echo $$ > pid; until [ -e stop ]; do sleep 0.05; done; echo saved > saved"
    )
    handler = signal.getsignal(number)
    calls: list[object] = []
    said: list[str] = []

    def show(events: list[Event]) -> None:
        if not calls and has_begun():
            calls.append(events)
            signal.raise_signal(number)

    with pytest.raises(KeyboardInterrupt):
        started(job, show, said)
    assert said == ["stopping after this step, with a checkpoint; a second Ctrl-C stops at once"]
    assert Path("run/saved").is_file()
    assert not is_running("run/pid")
    assert not job.run.stop_requested()
    assert signal.getsignal(number) is handler


def test_the_second_signal_kills_every_process_at_once() -> None:
    job = job_with_script("sleep 60 & echo $! > child; echo $$ > pid; wait")

    def show(events: list[Event]) -> None:
        if has_begun():
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        started(job, show)
    assert not is_running("run/pid")
    assert not is_running("run/child") or "Z" in Path(f"/proc/{Path('run/child').read_text().strip()}/stat").read_text()


def test_ranks_do_not_outlive_a_view_that_fails() -> None:
    job = job_with_script("echo $$ > pid; sleep 60")

    def show(events: list[Event]) -> None:
        if has_begun():
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        started(job, show)
    assert not is_running("run/pid")


def test_ranks_go_on_where_a_line_of_their_events_is_none() -> None:
    job = job_with_script("echo no event > events/rank001.jsonl; sleep 0.6; echo '{}' > result.json")
    assert started(job) == ["warning: run/events/rank001.jsonl: line 1 is not an event, and is left out"]


def test_a_rank_that_is_stuck_is_told_also_after_a_request_to_stop(monkeypatch: pytest.MonkeyPatch) -> None:
    Path("event").write_bytes(encode(Event(kind="step", step=1, total_steps=5, loss=2.0)))
    job = job_with_script("cat ../event > events/rank000.jsonl; touch started; sleep 60")
    monkeypatch.setattr(Watchdog, "stuck", lambda self: "rank 1 is stuck" if Path("run/stop").exists() else "")

    def show(events: list[Event]) -> None:
        if Path("run/started").exists() and not Path("run/stop").exists():
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(RunError, match="rank 1 is stuck; there is no checkpoint yet"):
        started(job, show)


@pytest.mark.parametrize("taken", ["mv ../run ../moved", "rm -r ../run"])
def test_a_run_whose_directory_is_taken_away_ends_with_a_sentence(taken: str) -> None:
    job = job_with_script(f"echo $$ > ../pid; {taken}; exec sleep 60")
    with pytest.raises(JobError, match="run was removed or moved while it was being trained; its ranks were ended"):
        started(job)
    assert not is_running("pid")
    assert not Path("run").exists()


def test_a_request_to_stop_from_before_does_not_stop_a_new_start() -> None:
    job = job_with_script("[ -e stop ] || echo '{}' > result.json")
    (job.run.path / "stop").touch()
    started(job)


def test_a_run_in_training_is_not_started_twice() -> None:
    """The ranks inherit the lock, so it holds even when their launcher is gone."""
    job = job_with_script("echo $$ > pid; until [ -e stop ]; do sleep 0.05; done; echo '{}' > result.json")
    refused: list[QdistError] = []

    def show(events: list[Event]) -> None:
        if not refused:
            with pytest.raises(RunError, match="run is being trained by another process") as caught:
                started(job)
            refused.append(caught.value)
            (job.run.path / "stop").touch()

    started(job, show)
    assert [error.try_ for error in refused] == ["wait for it to end, or choose another --run"]


def test_the_plan_that_ranks_read_is_the_one_in_the_script() -> None:
    job = prepare.prepare(spec())
    assert msgspec.json.decode(job.files["plan.json"], type=Plan) == job.plan


def test_ctrl_c_before_the_first_step_ends_at_once_and_the_run_can_go_on() -> None:
    job = job_with_script("echo $$ > pid; sleep 60")
    said: list[str] = []
    calls: list[object] = []

    def show(events: list[Event]) -> None:
        if not calls and has_begun():
            calls.append(events)
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        started(job, show, said)
    assert said == ["stopped before the first step; nothing to save"]
    assert not is_running("run/pid")
    assert not job.run.stop_requested()
    assert state_of(job.run) == "stopped"
    assert prepare.prepare_resume(job.run, {}).plan == job.plan


def attended(script: str, show: Callable[[list[Event]], None] = lambda events: None) -> list[str]:
    """Ranks that do something else than train, until they left the file `found`; what was said to the user."""
    said: list[str] = []
    job = job_with_script(script)
    with claim.claimed(job) as own:
        done = (job.run.path / "found").is_file
        ranks.attend(own, LocalRanks, show=show, say=said.append, done=done, loses="nothing was kept")
    return said


def test_ranks_that_do_not_train_have_ended_well_once_they_left_what_they_were_for() -> None:
    assert attended("touch found") == []


def test_ranks_that_do_not_train_and_leave_nothing_have_failed() -> None:
    with pytest.raises(JobError, match="without finishing"):
        attended("true")


def test_ctrl_c_ends_ranks_that_do_not_train_at_once() -> None:
    def show(events: list[Event]) -> None:
        if has_begun():
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        attended("echo $$ > pid; sleep 60", show)
    assert not is_running("run/pid")


def test_ctrl_c_before_the_next_step_of_a_resumed_run_leaves_its_checkpoint() -> None:
    job = job_with_script("touch started; sleep 60")
    job.run.checkpoint(3).mkdir()
    (job.run.checkpoint(3) / "DONE").touch()
    said: list[str] = []

    def show(events: list[Event]) -> None:
        if not said and Path("run/started").exists():
            signal.raise_signal(signal.SIGTERM)

    with pytest.raises(KeyboardInterrupt):
        started(job, show, said)
    assert said == ["stopped before the next step; nothing to save"]
    assert job.run.checkpoint_steps() == [3]


def test_a_lock_names_its_launcher() -> None:
    job = job_with_script("cp .lock seen; echo '{}' > result.json")
    started(job)
    assert json.loads(Path("run/seen").read_text())["pid"] == os.getpid()


def test_a_run_that_is_asked_to_stop_from_another_terminal_is_stopped_and_not_failed() -> None:
    job = job_with_script("until [ -e stop ]; do sleep 0.05; done")
    asked: list[subprocess.Popen[str]] = []

    def show(events: list[Event]) -> None:
        if not asked:
            line = [sys.executable, "-P", "-m", "qdist", "stop", "run"]
            environment = children.environment(PYTHONPATH=str(Path(qdist.__file__).parents[1]))
            asked.append(subprocess.Popen(line, env=environment, stdout=subprocess.PIPE, text=True))
        assert not asked[0].poll(), "it ended with an error, and nobody will stop the run"

    with pytest.raises(KeyboardInterrupt):
        started(job, show)
    said, _ = asked[0].communicate(timeout=30)
    assert said == (
        "run saves a checkpoint after this step and ends\nstopped; there is no checkpoint yet\n"
        "  go on: qdist launch --resume --run run\n"
    )
    assert state_of(job.run) == "stopped"
    assert not job.run.stop_requested()


def test_what_does_not_run_cannot_be_stopped() -> None:
    job_with_script("true")
    result = CliRunner().invoke(main, ["stop", "run"], prog_name="qdist")
    assert (result.exit_code, result.stderr) == (2, "error: run is not running: it is planned\n  try: qdist runs .\n")
