"""What `qdist generate` and `qdist chat` hand on."""

from collections.abc import Sequence

import pytest
from click.testing import CliRunner

from qdist.cli import chat, generate
from qdist.core.errors import SpecError
from qdist.core.text import GIB
from qdist.host.machine import probe
from tests.plans import CPU, gpus

FILE = ["run", "--prompts", "p.txt", "--out", "o.jsonl"]


def handed_on(monkeypatch: pytest.MonkeyPatch, command: str, *options: str) -> tuple[str, ...]:
    """The arguments of `python -m qdist.runtime.infer.generate`."""
    seen: list[tuple[str, ...]] = []

    def run_module(_: str, arguments: Sequence[str], *, asks: bool = False) -> int:
        assert asks == (command == "chat")
        seen.append(tuple(arguments))
        return 0

    monkeypatch.setattr(chat, "run_module", run_module)
    monkeypatch.setattr(generate, "run_kept", run_module)
    for module in (chat, generate):
        monkeypatch.setattr(module, "check_target", lambda name: None)
    monkeypatch.setattr(generate, "read_prompts", lambda path: [])
    if command == "chat":
        result = CliRunner().invoke(chat.chat, ["run", *options])
    else:
        result = CliRunner().invoke(generate.generate, [*FILE, *options])
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == 0, result.output
    return seen[0]


@pytest.mark.parametrize("command", ["chat", "file"])
def test_memory_is_handed_on_in_bytes_and_only_where_it_is_given(monkeypatch: pytest.MonkeyPatch, command: str) -> None:
    monkeypatch.setattr(probe, "cluster", lambda: gpus(1, 24))
    plain = handed_on(monkeypatch, command)
    assert plain[:2] == (command, "run")
    assert handed_on(monkeypatch, command, "--max-memory", "20GiB") == (
        *plain, "--max-memory-bytes", str(20 * GIB)
    )  # fmt: skip
    with pytest.raises(SpecError, match="not an amount of memory"):
        handed_on(monkeypatch, command, "--max-memory", "much")


@pytest.mark.parametrize("command", ["chat", "file"])
def test_memory_for_gpus_is_refused_where_there_is_none(monkeypatch: pytest.MonkeyPatch, command: str) -> None:
    monkeypatch.setattr(probe, "cluster", lambda: CPU)
    with pytest.raises(SpecError, match="--max-memory caps GPUs, and this machine has none"):
        handed_on(monkeypatch, command, "--max-memory", "20GiB")


@pytest.mark.parametrize("command", [chat.chat, generate.generate])
def test_help_says_where_the_model_goes(command: object) -> None:
    shown = CliRunner().invoke(command, ["--help"]).output  # type: ignore[arg-type]
    assert "A line says where it lies" in " ".join(shown.split())
    assert "--max-memory" in shown
