"""The calls to the manager over HTTP."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
import requests

from manager_client import ManagerClient, TextFile

A = "198.18.0.2"


class Answers(BaseHTTPRequestHandler):
    seen: list[tuple[str, str | None, bytes]]
    status, body = 200, b"{}"

    def do_GET(self) -> None:
        size = int(self.headers.get("Content-Length", 0))
        self.seen.append((f"{self.command} {self.path}", self.headers["Authorization"], self.rfile.read(size)))
        self.send_response(self.status)
        self.send_header("Content-Length", str(len(self.body)))
        self.end_headers()
        self.wfile.write(self.body)

    do_POST = do_GET  # noqa: N815

    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture
def real_manager() -> Iterator[tuple[ManagerClient, type[Answers]]]:
    class Handler(Answers):
        seen = []  # noqa: RUF012

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield ManagerClient([f"127.0.0.1:{server.server_port}"], lambda: "secret"), Handler
        server.shutdown()
        thread.join()


@pytest.mark.parametrize(
    ("call", "status", "body", "result"),
    [
        (lambda m: m.sync("r1"), 200, b'{"revision": "r2"}', {"revision": "r2"}),
        (lambda m: m.sync("r1"), 204, b"", None),
        (lambda m: m.sync("r1"), 200, b"<html>", requests.RequestException),
        (lambda m: m.sync("r1"), 401, b"", requests.RequestException),
        (lambda m: m.sync("r1"), 503, b"", requests.RequestException),
        (lambda m: m.report({"x": 1}), 200, b'{"decision": "OK"}', None),
        (lambda m: m.report({"x": 1}), 503, b"", requests.RequestException),
        (lambda m: m.stop(A, "a", "drained"), 204, b"", None),
        (lambda m: m.stop(A, "a", "drained"), 404, b"unknown", None),
        (lambda m: m.stop(A, "a", "drained"), 500, b"", requests.RequestException),
    ],
)
def test_every_answer_of_the_manager_is_a_value_or_a_request_exception(
    real_manager: tuple[ManagerClient, type[Answers]],
    call: Callable[[ManagerClient], Any],
    status: int,
    body: bytes,
    result: Any,
) -> None:
    manager, answers = real_manager
    answers.status, answers.body = status, body
    if result is requests.RequestException:
        with pytest.raises(requests.RequestException):
            call(manager)
    else:
        assert call(manager) == result


def test_every_call_carries_the_token_and_a_stop_names_its_balancer(
    real_manager: tuple[ManagerClient, type[Answers]],
) -> None:
    manager, answers = real_manager
    manager.sync("r1")
    manager.report({"x": 1})
    manager.stop(A, "a", "drained")
    assert [(line, token, json.loads(body or b"null")) for line, token, body in answers.seen] == [
        ("GET /sync?have=r1&wait=25.0", "Bearer secret", None),
        ("POST /pkts_info", "Bearer secret", {"x": 1}),
        ("POST /stop", "Bearer secret", {"ip": A, "id": "a", "reason": "drained"}),
    ]


def test_token_is_read_for_each_call_and_the_last_one_is_kept_where_its_file_is_missing(
    real_manager: tuple[ManagerClient, type[Answers]], tmp_path: Path
) -> None:
    _, answers = real_manager
    manager = ManagerClient(real_manager[0]._addresses, TextFile(tmp_path / "token"))
    for change in (lambda f: None, lambda f: f.write_text("one\n"), lambda f: f.write_text("two"), Path.unlink):
        change(tmp_path / "token")
        manager.report({})
    assert [token for _, token, _ in answers.seen] == ["Bearer ", "Bearer one", "Bearer two", "Bearer two"]


def test_address_that_run_sh_replaces_is_used_for_the_next_call(
    real_manager: tuple[ManagerClient, type[Answers]], tmp_path: Path
) -> None:
    _, answers = real_manager
    (tmp_path / "hostip.txt").write_text("127.0.0.1:1\n")
    manager = ManagerClient(TextFile(tmp_path / "hostip.txt"), lambda: "secret")
    with pytest.raises(requests.ConnectionError):
        manager.sync("")
    [address] = real_manager[0]._addresses
    for text in (f"{address}\n", ""):  # run.sh empties the file before it writes it
        (tmp_path / "hostip.txt").write_text(text)
        assert manager.sync("") == {}
    assert len(answers.seen) == 2


def test_reason_of_the_manager_is_in_the_error(real_manager: tuple[ManagerClient, type[Answers]]) -> None:
    manager, answers = real_manager
    answers.status, answers.body = 400, b"interval: expected a number\n"
    for call in (lambda: manager.sync(""), lambda: manager.report({}), lambda: manager.stop(A, "a", "drained")):
        with pytest.raises(requests.HTTPError, match=r"^400: interval: expected a number$"):
            call()
