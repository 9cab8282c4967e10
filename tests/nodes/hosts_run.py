"""Runs of a tiny model over the hosts of a bed: started, followed by the files that they write, and judged by them."""

import json
import math
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec

from qdist.core.nodes.job import NodeJob
from qdist.core.spec.run_spec import nest
from qdist.core.telemetry.nodes import NodeEvent
from tests.nodes.bed import Bed, Host

PORT, TOKEN = 29400, "a token of tests, not a secret"
AGENT = "qdist.runtime.nodes.agent"
TINY = {
    "model_type": "llama", "vocab_size": 320, "initializer_range": 0.2, "bos_token_id": 0, "eos_token_id": 1,
    "tie_word_embeddings": False, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128, "rms_norm_eps": 1e-5,
}  # fmt: skip
"""A config.json: enough for random weights."""


def save_tiny(folder: Path, **changes: Any) -> Path:
    """A folder with the configuration of a tiny model."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({**TINY, **changes}))
    return folder


class HostsRun:
    """One run over hosts. run: its directory, on each host of its own where the bed has it so.

    settings: dotted, with their values.
    """

    def __init__(
        self,
        bed: Bed,
        run: Path,
        settings: Mapping[str, Any],
        *,
        least: int = 1,
        rejoin_s: float = 40.0,
        gpus: Mapping[str, int] | None = None,
    ) -> None:
        self.bed, self.run, self.settings = bed, run, dict(settings)
        self._least, self._rejoin_s, self._gpus = least, rejoin_s, gpus or {}
        self.agents: dict[str, subprocess.Popen[str]] = {}
        self.starts = 0

    def start(self, host: Host, *, resume: bool = False, token: str = TOKEN) -> subprocess.Popen[str]:
        """Start a host's agent; one that was there before has ended."""
        hosts = list(self.bed.hosts.values())
        job = NodeJob(
            run=str(self.run), node=hosts.index(host), name=host.name, address=host.address,
            endpoints=tuple(f"{each.address}:{PORT}" for each in hosts), least=self._least, most=len(hosts),
            token=token,
            settings=nest(self.settings), resume=resume, rejoin_s=self._rejoin_s, attached=False,
            gpus=self._gpus.get(host.name),
        )  # fmt: skip
        self.starts += 1
        agent = host.popen(
            [sys.executable, "-u", "-P", "-m", AGENT], log=self.bed.folder / f"{host.name}.{self.starts}"
        )
        assert agent.stdin is not None
        agent.stdin.write(msgspec.json.encode(job).decode() + "\n")
        agent.stdin.flush()
        self.agents[host.name] = agent
        return agent

    def start_all(self) -> None:
        for host in self.bed.hosts.values():
            self.start(host)

    def launch(self, *arguments: str, python: str = sys.executable) -> subprocess.Popen[str]:
        """Start all of them by `qdist launch --hosts` on the first."""
        first = next(iter(self.bed.hosts.values()))
        hosts = self.bed.folder / "hosts.toml"
        hosts.write_text(hosts_toml(self.bed, self._least, self._rejoin_s, self._gpus))
        settings = [word for key, value in self.settings.items() for word in ("--set", f"{key}={_toml(value)}")]
        command = [python, "-P", "-m", "qdist", "launch", "--hosts", hosts, "--run", self.run, *settings, *arguments]
        self.starts += 1
        return first.popen(command, log=self.bed.folder / f"launch.{self.starts}")

    def events(self, hosts: Sequence[Host] | None = None) -> list[NodeEvent]:
        """What is noted of the nodes on these hosts, once each, in order of time."""
        found = [line for host in self._hosts(hosts) for line in _lines(host.disk(self.run) / "nodes.jsonl")]
        return sorted((msgspec.json.decode(line, type=NodeEvent) for line in set(found)), key=lambda event: event.time)

    def steps(self, hosts: Sequence[Host] | None = None) -> list[dict[str, Any]]:
        """Events of the first rank on the host that has most of them."""
        every = [_lines(host.disk(self.run) / "events/rank000.jsonl") for host in self._hosts(hosts)]
        return [json.loads(line) for line in max(every, key=len)]

    def last_step(self) -> int:
        """The step that the run has reached by what is written anywhere."""
        return max((event.get("step", 0) for event in self.steps() if event["kind"] == "step"), default=0)

    def losses(self, hosts: Sequence[Host] | None = None) -> dict[int, float]:
        """The loss of each step, where it was last done."""
        return {event["step"]: event["loss"] for event in self.steps(hosts) if event["kind"] == "step"}

    def done_twice(self) -> int:
        """Most steps that were lost at once."""
        most, reached = 0, 0
        for event in self.steps():
            if event["kind"] == "resume":
                most = max(most, reached - event.get("step", 0))
            elif event["kind"] == "step":
                reached = event["step"]
        return most

    def result(self, host: Host) -> Path:
        return host.disk(self.run) / "result.json"

    def left(self) -> dict[str, list[str]]:
        """What still runs on hosts."""
        return {name: found for name, host in self.bed.hosts.items() if (found := host.processes())}

    def said(self) -> str:
        """The last of what agents and launchers said, for a test that fails."""
        logs = sorted(path for path in self.bed.folder.glob("*.[0-9]*") if path.is_file())
        return "\n".join(f"--- {path.name}\n{path.read_text()[-2000:]}" for path in logs)

    def _hosts(self, hosts: Sequence[Host] | None) -> Sequence[Host]:
        return list(self.bed.hosts.values()) if hosts is None else hosts


def hosts_toml(bed: Bed, least: int, rejoin_s: float, gpus: Mapping[str, int]) -> str:
    """The file for `qdist launch --hosts`."""
    lines = [f"least = {least}", f"port = {PORT}", f"rejoin_seconds = {rejoin_s}"]
    for name, host in bed.hosts.items():
        lines += ["[[host]]", f'name = "{name}"', f'address = "{host.address}"']
        lines += [f"gpus = {gpus[name]}"] if name in gpus else []
    return "\n".join(lines) + "\n"


def largest_difference(losses: Mapping[int, float], wanted: Mapping[int, float]) -> float:
    """Between losses of equal steps; infinite where one has a step that the other lacks."""
    if losses.keys() != wanted.keys():
        return math.inf
    return max(abs(losses[step] - wanted[step]) for step in wanted)


def _lines(path: Path) -> list[str]:
    """Whole lines of a file that may not be there yet."""
    return path.read_text().rpartition("\n")[0].splitlines() if path.exists() else []


def _toml(value: object) -> str:
    return json.dumps(value) if isinstance(value, bool) else str(value)
