"""A hub on loopback that keeps what is uploaded: the few addresses that creating a repository and a commit ask for."""

import base64
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

TOKEN = "hf_test"


class FakeHub(ThreadingHTTPServer):
    """Repositories by name, with their files by branch."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.files: dict[str, dict[str, dict[str, bytes]]] = {}
        self.private: dict[str, bool] = {}
        self.commits: list[str] = []
        self.refusing: dict[str, int] = {}
        """Part of an address -> the status that it answers with."""

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


@contextmanager
def fake_hub() -> Iterator[FakeHub]:
    """A hub while the block runs."""
    hub = FakeHub()
    thread = threading.Thread(target=hub.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        hub.shutdown()
        hub.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    server: FakeHub
    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if self._refused():
            return
        match self.path.strip("/").split("/"):
            case ["api", "repos", "create"]:
                self._create(json.loads(body))
            case ["api", "validate-yaml"]:
                self._answer({"errors": [], "warnings": []})
            case ["api", "models", owner, name, "preupload", _]:
                files = [{"path": each["path"], "uploadMode": "regular", "shouldIgnore": False}
                         for each in json.loads(body)["files"]]  # fmt: skip
                self._answer({"files": files})
            case ["api", "models", owner, name, "branch", branch]:
                self.server.files[f"{owner}/{name}"].setdefault(branch, {})
                self._answer({})
            case ["api", "models", owner, name, "commit", branch]:
                self._commit(f"{owner}/{name}", branch, body)
            case _:
                self._answer({"error": f"no {self.path}"}, 404)

    def do_GET(self) -> None:
        name = self.path.removeprefix("/api/models/").split("/revision/")[0]
        if not self._refused():
            known = name in self.server.files
            self._answer({"id": name, "private": self.server.private.get(name)} if known else {}, 200 if known else 404)

    def _create(self, asked: dict[str, Any]) -> None:
        name = f"{asked['organization']}/{asked['name']}"
        known = name in self.server.files
        self.server.files.setdefault(name, {"main": {}})
        self.server.private.setdefault(name, asked.get("visibility") == "private" or bool(asked.get("private")))
        self._answer({"url": f"{self.server.address}/{name}", "id": name}, 409 if known else 200)

    def _commit(self, name: str, branch: str, body: bytes) -> None:
        for line in map(json.loads, body.splitlines()):
            if line["key"] == "header":
                self.server.commits.append(line["value"]["summary"])
            elif line["key"] == "file":
                self.server.files[name][branch][line["value"]["path"]] = base64.b64decode(line["value"]["content"])
        self._answer({"commitUrl": f"{self.server.address}/{name}/commit/1", "commitOid": "1", "success": True})

    def _refused(self) -> bool:
        """Whether an error was sent, for a wrong token or as the test wants it."""
        status = next((status for part, status in self.server.refusing.items() if part in self.path), 0)
        if self.headers.get("Authorization") != f"Bearer {TOKEN}" and "validate" not in self.path:
            status = 401
        if status:
            self._answer({"error": "said by the hub"}, status)
        return bool(status)

    def _answer(self, content: dict[str, Any], status: int = 200) -> None:
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        """Say nothing."""
