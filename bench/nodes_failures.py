"""Runs of three hosts, one of which fails or comes back at a random moment: is it named, what is lost, what is left?

    python bench/nodes_failures.py [--kinds killed,cut] [--times 10] [--seed 0] [--shared] [--launch] [--json FILE]

Hosts are namespaces (tests/nodes/bed.py), a rank on each, over a tiny model with random weights. A row a kind: how
many of its runs went as they should, the slowest seconds until the host was named and until a step after it, the most
steps that were done twice, the largest difference of a step's loss from the run that nobody disturbed.
"""

import argparse
import json
import random
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from qdist.core.telemetry.nodes import NodeEvent
from tests.nodes.bed import Bed, Host, wait_for, why_not
from tests.nodes.hosts_run import HostsRun, largest_difference, save_tiny

KINDS = ("killed", "cut", "stopped", "first-killed", "returns", "waits", "cut-returns")
GROWS = ("returns", "cut-returns")
"""Kinds whose host has to be back before the others have ended."""
NAMED_S, CLOSE, SAVE_STEPS = 30.0, 1e-5, 20
_STARTS_S, _HAPPENS_S, _ENDS_S, _REJOIN_S = 120.0, 90.0, 180.0, 40.0
SETTINGS = {
    "load_format": "dummy", "method": "qlora", "bits": 16, "seq_len": 64, "global_batch": 12, "lora.r": 4,
    "train.save_steps": SAVE_STEPS, "train.held_out": 0.0,
}  # fmt: skip


class Outcome(NamedTuple):
    """Of one run. Seconds are nan where it never happened."""

    kind: str
    faults: tuple[str, ...]
    named_s: float
    again_s: float
    done_twice: int
    difference: float
    equal: int
    """Steps whose loss is the same in every bit."""
    generations: int
    wall_s: float


def main() -> None:
    """Run them and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kinds", default=",".join(KINDS))
    parser.add_argument("--times", type=int, default=10)
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--shared", action="store_true", help="one disk for all hosts")
    parser.add_argument("--launch", action="store_true", help="start them by qdist launch --hosts")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--keep", type=Path, help="folder for what runs that went wrong said")
    given = parser.parse_args()
    if reason := why_not():
        sys.exit(reason)
    wanted, lasted = undisturbed(given)
    print(f"undisturbed: {len(wanted)} steps in {lasted:.1f} s", flush=True)
    dice, rows = random.Random(given.seed), []
    print(f"{'kind':14} {'good':>7} {'named s':>8} {'again s':>8} {'twice':>6} {'loss off':>9} {'equal':>6}  faults")
    for kind in given.kinds.split(","):
        latest = (0.3 if kind in GROWS else 0.8) * given.steps
        outcomes = [disturbed(kind, given, wanted, dice.uniform(1, latest)) for _ in range(given.times)]
        rows += outcomes
        print(line(kind, outcomes), flush=True)
        if given.json:
            given.json.write_text(json.dumps([row._asdict() for row in rows], indent=1))


def line(kind: str, outcomes: list[Outcome]) -> str:
    """One row of the table."""
    good = sum(not outcome.faults for outcome in outcomes)
    worst = [
        max(getattr(outcome, name) for outcome in outcomes)
        for name in ("named_s", "again_s", "done_twice", "difference")
    ]
    equal = min(outcome.equal for outcome in outcomes)
    faults = "; ".join(sorted({fault for outcome in outcomes for fault in outcome.faults}))
    return (
        f"{kind:14} {good:3}/{len(outcomes):<3} {worst[0]:8.1f} {worst[1]:8.1f} {worst[2]:6} {worst[3]:9.1e} "
        f"{equal:6}  {faults}"
    )


def undisturbed(given: argparse.Namespace) -> tuple[dict[int, float], float]:
    """Losses of the run that nothing happens to, and the seconds from its first step to its end."""
    with tempfile.TemporaryDirectory(prefix="qdist-nodes-") as folder, hosts(Path(folder), given) as bed:
        run = begun(bed, Path(folder), given, least=3)
        since = time.monotonic()
        finish(run, list(bed.hosts.values()))
        return run.losses(), time.monotonic() - since


def disturbed(kind: str, given: argparse.Namespace, wanted: dict[int, float], moment: float) -> Outcome:
    """One run that something happens to. moment: the step at which, with a fraction."""
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="qdist-nodes-") as folder, hosts(Path(folder), given) as bed:
        run = begun(bed, Path(folder), given, least=3 if kind == "waits" else 1)
        wait_for(lambda: run.last_step() >= int(moment), seconds=_ENDS_S, what=f"step {int(moment)}")
        time.sleep(moment % 1 / 5)
        names = list(bed.hosts)
        victim = bed.hosts[names[0] if kind == "first-killed" else names[1 + int(moment * 1000) % 2]]
        try:
            outcome = Trial(kind, run, victim, wanted).outcome()
        except TimeoutError as error:
            outcome = Outcome(kind, (f"{error}",), *(float("nan"),) * 2, 0, float("inf"), 0, 0, 0.0)
        if outcome.faults and given.keep:
            given.keep.mkdir(parents=True, exist_ok=True)
            events = "\n".join(map(str, run.events()))
            said = f"{outcome}\nvictim {victim.name} at step {moment:.2f}\n{events}\n{run.said()}\n"
            (given.keep / f"{kind}-{moment:.2f}.txt").write_text(said)
    return outcome._replace(wall_s=time.monotonic() - began)


class Trial:
    """One failure of one host, and what comes of it."""

    def __init__(self, kind: str, run: HostsRun, victim: Host, wanted: dict[int, float]) -> None:
        self._kind, self._run, self._victim, self._wanted = kind, run, victim, wanted
        self._others = [host for host in run.bed.hosts.values() if host is not victim]
        self._named = self._again = float("nan")
        self._faults: list[str] = []

    def outcome(self) -> Outcome:
        """Raises TimeoutError, saying what did not happen."""
        before, since = self._resumes(), time.monotonic()
        self._disturb()
        self._await("lost", lambda event: event.name == self._victim.name)
        self._named = time.monotonic() - since
        if self._kind == "waits":
            self._await("waiting", lambda event: True)
        self._give_back()
        wait_for(lambda: self._has_stepped_again(before), seconds=_ENDS_S, what="a step afterwards")
        self._again = time.monotonic() - since
        ends_well = self._others if self._kind not in (*GROWS, "waits") else list(self._hosts())
        finish(self._run, ends_well)
        self._check_end()
        losses = self._run.losses(ends_well)
        missing = len(self._wanted.keys() - losses.keys())
        difference = largest_difference(losses, {step: self._wanted[step] for step in losses})
        equal = sum(losses.get(step) == loss for step, loss in self._wanted.items())
        self._check(difference <= CLOSE, f"losses differ by {difference:.1e}")
        # Hosts with disks of their own copy the first rank's events once a second: its last ones end with its disk.
        self._check(not missing or self._kind == "first-killed", f"{missing} steps are not in the events")
        self._check(self._run.done_twice() <= SAVE_STEPS, f"{self._run.done_twice()} steps done twice")
        self._check(self._named <= NAMED_S, f"named after {self._named:.0f} s")
        generations = max(event.generation for event in self._run.events())
        return Outcome(
            self._kind, tuple(self._faults), self._named, self._again, self._run.done_twice(), difference, equal,
            generations, 0.0,
        )  # fmt: skip

    def _resumes(self) -> int:
        return sum(event["kind"] == "resume" for event in self._run.steps(self._others))

    def _has_stepped_again(self, before: int) -> bool:
        kinds = [event["kind"] for event in self._run.steps(self._others)]
        return self._resumes() > before and "step" in kinds[len(kinds) - kinds[::-1].index("resume") :]

    def _hosts(self) -> list[Host]:
        return list(self._run.bed.hosts.values())

    def _disturb(self) -> None:
        if self._kind in ("cut", "cut-returns"):
            self._victim.cut()
        elif self._kind == "stopped":
            self._victim.stop()
        else:
            self._victim.kill()

    def _give_back(self) -> None:
        """Let a host that is to come back do so, once the others are at work again or wait."""
        if self._kind == "returns":
            self._await("formed", lambda event: len(event.members) == 2)
        if self._kind in ("returns", "waits"):
            self._victim.boot()
            self._run.start(self._victim)
        if self._kind == "cut-returns":
            self._await("formed", lambda event: len(event.members) == 2)
            self._victim.mend()
        if self._kind in GROWS:

            def grown(event: NodeEvent) -> bool:
                return event.generation > 2 and len(event.members) == 3

            self._await("formed", grown)

    def _await(self, kind: str, fits: Callable[[NodeEvent], bool]) -> None:
        wait_for(
            lambda: any(event.kind == kind and fits(event) for event in self._run.events(self._others)),
            seconds=_HAPPENS_S,
            what=f"{kind!r} in nodes.jsonl",
        )

    def _check_end(self) -> None:
        """Nothing is left running: not where the run ended, nor on the host that failed, once it can notice."""
        if self._kind == "stopped":
            self._victim.cont()
        if self._kind == "cut":
            self._victim.mend()
        try:
            wait_for(lambda: not self._run.left(), seconds=_REJOIN_S + 40, what="an end of all processes")
        except TimeoutError:
            left = {name: len(found) for name, found in self._run.left().items()}
            self._faults.append(f"left running: {left}")

    def _check(self, holds: bool, fault: str) -> None:
        if not holds:
            self._faults.append(fault)


def hosts(folder: Path, given: argparse.Namespace) -> Bed:
    """Three hosts with a cache each, and a run directory each or one for all."""
    save_tiny(folder / "model")
    cache = {"": {"QDIST_CACHE": str(folder / "own/cache"), "CUDA_VISIBLE_DEVICES": ""}}
    (folder / "shared").mkdir()
    return Bed(folder / "bed", ["ash", "birch", "cedar"], own=[folder / "own"], environ=cache)


def begun(bed: Bed, folder: Path, given: argparse.Namespace, *, least: int) -> HostsRun:
    """A run that has done its first step."""
    settings: dict[str, Any] = {**SETTINGS, "model": str(folder / "model"), "steps": given.steps}
    run = HostsRun(
        bed, folder / ("shared" if given.shared else "own") / "run", settings, least=least, rejoin_s=_REJOIN_S
    )
    if given.launch:
        run.agents = dict.fromkeys(bed.hosts, run.launch())
    else:
        run.start_all()
    try:
        wait_for(lambda: run.last_step() > 0 or _ended(run), seconds=_STARTS_S, what="a first step")
    except TimeoutError as error:
        sys.exit(f"{error}\n{run.said()}")
    if not run.last_step():
        sys.exit(f"the run did not start\n{run.said()}")
    return run


def finish(run: HostsRun, hosts: list[Host]) -> None:
    """Wait until the run has ended well on these hosts; raise TimeoutError where it does not."""
    wait_for(
        lambda: any(event.kind == "finished" for event in run.events(hosts)), seconds=_ENDS_S, what="the run's end"
    )
    wait_for(lambda: all(run.result(host).exists() for host in hosts), seconds=20, what="result.json everywhere")
    for host in hosts:
        wait_for(
            lambda host=host: run.agents[host.name].poll() is not None,
            seconds=30,
            what=f"an end of {host.name}'s agent",
        )


def _ended(run: HostsRun) -> bool:
    return any(agent.poll() is not None for agent in run.agents.values())


if __name__ == "__main__":
    main()
