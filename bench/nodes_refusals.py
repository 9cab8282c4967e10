"""What a user reads where the hosts of a run do not fit together: each a sentence that names the host.

    python bench/nodes_refusals.py [--only WORD,WORD]

Two hosts as namespaces (tests/nodes/bed.py), a disk each; something is wrong with one of them, and the run is started.
"""

import argparse
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

from tests.nodes.bed import Bed, Host, why_not
from tests.nodes.hosts_run import PORT, HostsRun, save_tiny
from tests.runtime.tiny import save_data, save_model

_SETTINGS = {
    "load_format": "dummy", "bits": 16, "seq_len": 16, "global_batch": 4, "lora.r": 4, "steps": 3,
    "train.held_out": 0.0,
}  # fmt: skip
_FAKETIME = "/usr/lib/x86_64-linux-gnu/faketime/libfaketime.so.1"
_LISTENS = "import socket, time; s = socket.create_server(('{0}', {1})); print('ready', flush=True); time.sleep(1e4)"
_ENDS_S = 90.0


class Wrong(NamedTuple):
    """One thing that is wrong. names: what its sentence has to name."""

    names: str
    make: Callable[[HostsRun, Host, Host, ExitStack], None]
    environ: Callable[[Path], Mapping[str, str]] = lambda folder: {}
    """Variables of the second host."""
    by_hand: bool = False
    """Whether agents are started one by one, the second with another token."""


def other_versions(folder: Path) -> Mapping[str, str]:
    """A peft that only its metadata knows."""
    fake = folder / "site/peft-0.1.2.dist-info"
    fake.mkdir(parents=True)
    (fake / "METADATA").write_text("Metadata-Version: 2.1\nName: peft\nVersion: 0.1.2\n")
    return {"PYTHONPATH": f"{folder / 'site'}:{Path(__file__).parents[1]}"}


def late_clock(folder: Path) -> Mapping[str, str]:
    """An hour ahead, as libfaketime has it; time that only runs is left alone."""
    return {"LD_PRELOAD": _FAKETIME, "FAKETIME": "+1h", "FAKETIME_DONT_FAKE_MONOTONIC": "1"}


def other_model(run: HostsRun, ash: Host, birch: Host, stack: ExitStack) -> None:
    """A folder of the same name with other weights."""
    real_run(run, ash, birch, seeds=(0, 1), counts=(40, 40))


def other_data(run: HostsRun, ash: Host, birch: Host, stack: ExitStack) -> None:
    """A file of the same name with one line less."""
    real_run(run, ash, birch, seeds=(0, 0), counts=(40, 39))


def real_run(run: HostsRun, *hosts: Host, seeds: tuple[int, int], counts: tuple[int, int]) -> None:
    """Over weights and data that each host has on its own disk."""
    folder = run.run.parent
    for host, seed, count in zip(hosts, seeds, counts, strict=True):
        save_model(host.disk(folder / "model"), seed=seed)
        save_data(host.disk(folder / "data.jsonl"), count)
    run.settings |= {"model": str(folder / "model"), "data.path": str(folder / "data.jsonl"), "load_format": "auto"}


def no_room(run: HostsRun, ash: Host, birch: Host, stack: ExitStack) -> None:
    """A disk of 64 KiB under the run."""
    birch.fill(run.run, 1 << 16)


def no_cache(run: HostsRun, ash: Host, birch: Host, stack: ExitStack) -> None:
    """A disk of 8 KiB under the cache of packed weights and tokens."""
    real_run(run, ash, birch, seeds=(0, 0), counts=(40, 40))
    birch.fill(run.run.parent / "cache", 1 << 13)


def port_in_use(run: HostsRun, ash: Host, birch: Host, stack: ExitStack) -> None:
    """Somebody else listens where the first host is to let others in."""
    listens = ash.popen([sys.executable, "-c", _LISTENS.format(ash.address, PORT)])
    assert listens.stdout is not None
    assert listens.stdout.readline() == "ready\n"


def unreachable(run: HostsRun, ash: Host, birch: Host, stack: ExitStack) -> None:
    """Its cable is out."""
    birch.cut()


def unknown_key(run: HostsRun, ash: Host, birch: Host, stack: ExitStack) -> None:
    """ssh knows no key of the second host."""
    known = ash.folder / "home/.ssh/known_hosts"
    known.write_text("".join(line for line in known.read_text().splitlines(True) if not line.startswith("birch")))


def nothing(run: HostsRun, ash: Host, birch: Host, stack: ExitStack) -> None:
    """What is wrong is in the environment or the token."""


WRONG = {
    "versions that differ": Wrong("birch", nothing, other_versions),
    "another model on one host": Wrong("birch", other_model),
    "other data on one host": Wrong("birch", other_data),
    "no room for the run": Wrong("birch", no_room),
    "no room for the cache": Wrong("birch", no_cache),
    "a wrong token": Wrong("10.77.0.11", nothing, by_hand=True),
    "a port in use": Wrong("10.77.0.11", port_in_use),
    "an unreachable host": Wrong("birch", unreachable),
    "a host key that is not known": Wrong("birch", unknown_key),
    "a clock 1 h off": Wrong("birch", nothing, late_clock),
}


def main() -> None:
    """Print each case, its seconds and its sentences; exit with 1 where one does not name the host."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="")
    given = parser.parse_args()
    if reason := why_not():
        sys.exit(reason)
    bad = 0
    for name, wrong in WRONG.items():
        if any(word in name for word in given.only.split(",")):
            began = time.monotonic()
            said, left = refusal(wrong)
            good = (
                any(wrong.names in line for line in said if line.startswith(("error:", '{"kind":"error"'))) and not left
            )
            bad += not good
            ended = f"{time.monotonic() - began:.1f} s" + (f", LEFT RUNNING on {left}" if left else "")
            print(f"{'good' if good else 'BAD'}  {name}, {ended}")
            print("\n".join(f"      {line}" for line in said), flush=True)
    sys.exit(bool(bad))


def refusal(wrong: Wrong) -> tuple[list[str], str]:
    """The last lines that are said, and what still runs afterwards."""
    with tempfile.TemporaryDirectory(prefix="qdist-nodes-") as text, ExitStack() as stack:
        folder = Path(text)
        environ = {
            "": {"QDIST_CACHE": str(folder / "own/cache"), "CUDA_VISIBLE_DEVICES": ""}, "birch": wrong.environ(folder),
        }  # fmt: skip
        bed = stack.enter_context(Bed(folder / "bed", ["ash", "birch"], own=[folder / "own"], environ=environ))
        settings = {**_SETTINGS, "model": str(save_tiny(folder / "model"))}
        run = HostsRun(bed, folder / "own/run", settings, least=2)
        ash, birch = bed.hosts.values()
        wrong.make(run, ash, birch, stack)
        if wrong.by_hand:
            run.start(ash)
            ended = run.start(birch, token="another token of tests")
        else:
            ended = run.launch()
        ended.wait(_ENDS_S)
        log = sorted(bed.folder.glob("birch.[0-9]*" if wrong.by_hand else "launch.[0-9]*"))[-1]
        lines = [line for line in log.read_text().splitlines() if line.strip()]
        left = {} if wrong.by_hand or wrong.make is port_in_use else run.left()
        return lines[-2:], ", ".join(left)


if __name__ == "__main__":
    main()
