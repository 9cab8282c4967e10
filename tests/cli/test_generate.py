"""What `qdist generate` and `qdist chat` hand on."""

from typing import Any

import msgspec
import pytest
from click.testing import CliRunner

from qdist.cli import chat, generate
from qdist.cli.main import main
from qdist.core.errors import SpecError
from qdist.core.requests import Answering, Chat, Generate
from qdist.core.text import GIB
from qdist.host.machine import probe
from qdist.host.sources import targets
from tests.plans import CPU, gpus

FILE = ["run", "--prompts", "p.txt", "--out", "o.jsonl"]


def handed_on(monkeypatch: pytest.MonkeyPatch, command: str, *options: str) -> Answering:
    """What a process is asked to do."""
    seen: list[Any] = []
    for module in (chat, generate):
        monkeypatch.setattr(module, "run_task", seen.append)
        monkeypatch.setattr(targets, "check_model", lambda name, *, trusted: None)
    monkeypatch.setattr(generate, "read_prompts", lambda path, *, reading: [])
    if command == "chat":
        result = CliRunner().invoke(chat.chat, ["run", *options])
    else:
        result = CliRunner().invoke(generate.generate, [*FILE, *options])
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == 0, result.output
    found: Answering = seen[0]
    return found


@pytest.mark.parametrize("command", ["chat", "file"])
def test_memory_is_handed_on_and_only_where_it_is_given(monkeypatch: pytest.MonkeyPatch, command: str) -> None:
    monkeypatch.setattr(probe, "cluster", lambda: gpus(1, 24))
    plain = handed_on(monkeypatch, command)
    assert (type(plain), plain.run, plain.max_memory_bytes) == (Chat if command == "chat" else Generate, "run", None)
    capped = handed_on(monkeypatch, command, "--max-memory", "20GiB")
    assert capped == msgspec.structs.replace(plain, max_memory="20GiB")
    assert capped.max_memory_bytes == 20 * GIB
    with pytest.raises(SpecError, match="not an amount of memory"):
        handed_on(monkeypatch, command, "--max-memory", "much")


def test_only_a_chat_reads_what_is_typed_and_answers_ctrl_c_itself() -> None:
    assert (Chat.asks, Generate.asks) == (True, False)


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


def test_base_and_adapter_are_not_compared_where_llama_cpp_has_them_merged() -> None:
    result = CliRunner().invoke(main, ["chat", "run", "--compare", "--engine", "llama.cpp"], prog_name="qdist")
    assert result.exit_code == 2
    assert result.stderr.startswith("error: --compare asks the base too, and llama.cpp has the adapter merged")
    assert result.stderr.endswith("try: --engine qdist\n")
