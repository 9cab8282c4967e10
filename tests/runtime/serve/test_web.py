"""What the page's routes send: its files under a strict policy, and the run as data."""

import json
from pathlib import Path
from typing import Any

import pytest
from starlette.applications import Starlette
from starlette.testclient import TestClient

import qdist
from qdist.host.run.rundir import RunDir
from qdist.runtime.serve.app import Service, application
from qdist.runtime.serve.web import announce_page, page_routes
from tests.cli.test_report import run_of

FOLDER = Path(str(qdist.__file__)).parent / "runtime/serve/page"


def client(run: Path | None = None) -> TestClient:
    return TestClient(Starlette(routes=page_routes(RunDir(run) if run else None)))


@pytest.mark.parametrize(
    ("path", "kind"),
    [
        ("/", "text/html"), ("/page/app.js", "text/javascript"), ("/page/style.css", "text/css"),
        ("/page/icon.svg", "image/svg+xml"),
    ],
)  # fmt: skip
def test_a_file_is_sent_as_what_it_is_under_a_policy_without_inline_code(path: str, kind: str) -> None:
    answer = client().get(path)
    assert (answer.status_code, answer.headers["content-type"].partition(";")[0]) == (200, kind)
    assert answer.content == (FOLDER / (path.rpartition("/")[2] or "index.html")).read_bytes()
    policy = dict(part.strip().split(" ", 1) for part in answer.headers["content-security-policy"].split(";"))
    assert (policy["default-src"], policy["script-src"], policy["style-src"]) == ("'none'", "'self'", "'self'")
    assert "unsafe" not in str(policy)
    assert answer.headers["x-content-type-options"] == "nosniff"


@pytest.mark.parametrize(
    "path", ["/page/", "/page/none.js", "/page/../web.py", "/page/%2e%2e/web.py", "/page/index.html/x"]
)
def test_nothing_else_is_sent(path: str) -> None:
    assert client().get(path).status_code == 404


def test_the_page_names_no_other_server_and_has_no_inline_code() -> None:
    html = (FOLDER / "index.html").read_text()
    assert "//" not in html
    assert [word for word in ("<style", " style=", " onclick", "<script>") if word in html] == []
    assert [path.name for path in FOLDER.glob("*.js") if "innerHTML" in path.read_text()] == []


def test_a_run_is_sent_with_its_curves_and_what_was_asked_of_it(tmp_path: Path) -> None:
    answer = dict.fromkeys(("question", "before", "after", "expected"), "why?")
    sent = client(run_of(tmp_path / "r", result={"answers": [answer]})).get("/run/report").json()
    assert (sent["name"], sent["state"], sent["questions"]) == ("r", "finished", ["why?"])
    assert [chart["key"] for chart in sent["charts"]] == ["loss", "speed", "gradient", "rate"]
    assert sent["charts"][0]["series"][0]["y"] == [3.0, 1.5, 1.0, 0.75, 0.6]


def test_a_plain_model_has_no_run() -> None:
    assert client().get("/run/report").status_code == 404


def test_a_broken_run_is_told_with_what_to_try(tmp_path: Path) -> None:
    run = run_of(tmp_path / "r")
    (run / "plan.json").write_text("{")
    answer = client(run).get("/run/report")
    error: dict[str, Any] = json.loads(answer.content)["error"]
    assert (answer.status_code, "plan.json" in error["message"], bool(error["try"])) == (500, True, True)


def test_a_browser_is_opened_where_there_is_a_screen_and_it_is_wanted(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    opened: list[str] = []
    monkeypatch.setattr("webbrowser.open", opened.append)
    monkeypatch.delenv("WAYLAND_DISPLAY", raising=False)
    for display, opens in ((":0", True), (":0", False), ("", True)):
        monkeypatch.setenv("DISPLAY", display) if display else monkeypatch.delenv("DISPLAY", raising=False)
        announce_page("http://127.0.0.1:8000", opens=opens)
    assert opened == ["http://127.0.0.1:8000/"]
    assert capsys.readouterr().out == "the page is at http://127.0.0.1:8000/\n" * 3


def test_the_page_is_open_and_the_run_and_the_models_need_the_key(tmp_path: Path) -> None:
    service = Service(key="secret")
    asking = TestClient(application(service, page_routes(RunDir(run_of(tmp_path / "r")))))
    key = {"Authorization": "Bearer secret"}
    assert [asking.get(path).status_code for path in ("/", "/page/app.js", "/run/report")] == [200, 200, 401]
    assert asking.get("/run/report", headers=key).status_code == 200
