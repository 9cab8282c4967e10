"""Does `qdist metrics` print, write and serve a run's figures as they are at that moment?"""

import socket
import struct
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
from click.testing import CliRunner, Result

from qdist.cli.main import main
from qdist.cli.metrics import Source, server
from qdist.core.errors import MachineError
from qdist.core.telemetry.events import Event, encode
from qdist.core.telemetry.heartbeat import Heartbeat
from qdist.core.telemetry.heartbeat import encode as encode_pulse
from qdist.core.telemetry.prometheus import CONTENT_TYPE
from qdist.host.run.rundir import RunDir
from tests.plans import CPU, planned


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    """A run that said one step and went without a word."""
    run = RunDir(tmp_path / "run")
    run.events.mkdir(parents=True)
    run.pulses.mkdir()
    (run.path / "plan.json").write_bytes(msgspec.json.encode(planned("smollm2-135m", CPU)))
    run.pulse_file(0).write_bytes(encode_pulse(Heartbeat(rank=0, pid=1, host="h", time=5.0)))
    told(run, 1, loss=3.5)
    return run


def told(run: RunDir, step: int, *, loss: float) -> None:
    with run.event_file(0).open("ab") as file:
        file.write(encode(Event(kind="step", step=step, loss=loss)))


def qdist(*arguments: str) -> Result:
    return CliRunner().invoke(main, ["metrics", *arguments], prog_name="qdist")


@pytest.fixture
def address(run: RunDir) -> Iterator[str]:
    """Where the figures are served."""
    with server(Source(run), "127.0.0.1", 0) as bound:
        thread = threading.Thread(target=bound.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield f"http://127.0.0.1:{bound.server_port}"
        bound.shutdown()
        thread.join()


def test_the_text_is_printed_and_nothing_else(run: RunDir) -> None:
    result = qdist(str(run.path))
    assert result.exit_code == 0, result.output
    assert result.stdout.startswith("# HELP qdist_run_info ")
    assert f'\nqdist_loss{{run="{run.path}"}} 3.5\n' in result.stdout
    assert f'\nqdist_run_state{{run="{run.path}",state="killed"}} 1.0\n' in result.stdout
    assert f'\nqdist_rank_beat_timestamp_seconds{{run="{run.path}",rank="0"}} 5.0\n' in result.stdout


def test_a_file_holds_what_would_be_printed(run: RunDir, tmp_path: Path) -> None:
    out = tmp_path / "qdist.prom"
    assert qdist(str(run.path), "--out", str(out)).stdout == ""
    assert out.read_text() == qdist(str(run.path)).stdout
    assert out.stat().st_mode & 0o444 == 0o444  # the collector is another user


def test_every_scrape_sees_what_was_said_since(run: RunDir, address: str) -> None:
    with urllib.request.urlopen(f"{address}/metrics", timeout=10) as answer:
        assert answer.headers["Content-Type"] == CONTENT_TYPE
        assert '"} 3.5\n' in answer.read().decode()
    told(run, 2, loss=1.25)
    with urllib.request.urlopen(f"{address}/metrics?x", timeout=10) as answer:
        text = answer.read().decode()
    assert f'qdist_loss{{run="{run.path}"}} 1.25\n' in text
    assert f'qdist_step{{run="{run.path}"}} 2\n' in text


def test_a_broken_run_is_an_error_to_the_scraper_and_not_the_end(run: RunDir, address: str) -> None:
    plan = (run.path / "plan.json").read_bytes()
    (run.path / "plan.json").unlink()
    with pytest.raises(urllib.error.HTTPError, match="500") as caught:
        urllib.request.urlopen(f"{address}/metrics", timeout=10)
    assert "is not a run" in caught.value.read().decode()
    caught.value.close()
    (run.path / "plan.json").write_bytes(plan)
    with urllib.request.urlopen(f"{address}/metrics", timeout=10) as answer:
        assert answer.status == 200


def test_other_paths_are_not_found(address: str) -> None:
    with pytest.raises(urllib.error.HTTPError, match="404") as caught:
        urllib.request.urlopen(f"{address}/", timeout=10)
    caught.value.close()


def test_a_port_in_use_is_two_lines(run: RunDir) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(MachineError, match=f"127.0.0.1:{port} cannot be served"):
            server(Source(run), "127.0.0.1", port)


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("--out", "x", "--serve", "0"), 2, "give one of the two"),
        (("--host", "0.0.0.0"), 2, "--host goes with --serve"),
        (("--out", "/nowhere/x"), 2, "/nowhere/x cannot be written: No such file"),
    ],
)
def test_what_cannot_be_done_is_refused(run: RunDir, arguments: tuple[str, ...], code: int, message: str) -> None:
    result = qdist(str(run.path), *arguments)
    assert (result.exit_code, message in result.stderr) == (code, True)


def test_no_run_is_an_error(tmp_path: Path) -> None:
    assert qdist(str(tmp_path / "none")).stderr.startswith(f"error: {tmp_path / 'none'} is not a run")


def test_clients_that_say_nothing_keep_nobody_waiting(run: RunDir, address: str) -> None:
    host, port = address.removeprefix("http://").split(":")
    slow = [socket.create_connection((host, int(port)), timeout=10) for _ in range(40)]
    for one in slow:
        one.sendall(b"GET /metr")
    with urllib.request.urlopen(f"{address}/metrics", timeout=10) as answer:
        assert answer.status == 200
    assert slow[0].recv(1) == b""  # the oldest had to go
    for one in slow:
        one.close()


def test_a_client_that_leaves_is_no_traceback(run: RunDir, address: str, capfd: pytest.CaptureFixture[str]) -> None:
    host, port = address.removeprefix("http://").split(":")
    for _ in range(5):
        with socket.create_connection((host, int(port)), timeout=10) as leaving:
            leaving.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            leaving.sendall(b"GET /metrics HTTP/1.0\r\n\r\n")
    with urllib.request.urlopen(f"{address}/metrics", timeout=10) as answer:
        answer.read()
    assert "Traceback" not in capfd.readouterr().err
