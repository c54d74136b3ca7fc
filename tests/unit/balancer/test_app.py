"""Port 5000 with silent and slow clients: it answers others, and disconnects them."""

from __future__ import annotations

import contextlib
import http.client
import resource
import socket
import time
from collections.abc import Iterator

import pytest

import app
from servers import CHUNKED, RESET, WITHOUT_PAUSE, in_thread, without_pause

SILENT = 2000


@pytest.fixture
def port() -> Iterator[int]:
    """A server in a thread with its own event loop, as in the balancer."""
    made = app.create_app(lambda: ({"revision": "r1"}, 200), lambda: b"flows 3.0\n")
    number, end = in_thread(lambda: app.make_server(made, "127.0.0.1", 0))
    yield number
    end()


def get(port: int, path: str = "/sync") -> tuple[int, bytes, float]:
    began = time.monotonic()
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    connection.request("GET", path)
    answer = connection.getresponse()
    body = answer.read()
    connection.close()
    return answer.status, body, time.monotonic() - began


def test_state_and_metrics_are_served(port: int) -> None:
    assert get(port)[:2] == (200, b'{"revision":"r1"}\n')
    assert get(port, "/metrics")[:2] == (200, b"flows 3.0\n")
    assert get(port, "/etc/passwd")[0] == 404


def test_two_thousand_silent_connections_do_not_delay_the_health_check(port: int) -> None:
    if resource.getrlimit(resource.RLIMIT_NOFILE)[0] < 2 * SILENT + 100:
        pytest.skip("needs more open files")
    with contextlib.ExitStack() as silent:
        for _ in range(SILENT):
            silent.enter_context(socket.create_connection(("127.0.0.1", port), 10))
        answers = [get(port) for _ in range(3)]
    assert [status for status, _, _ in answers] == [200] * 3
    assert max(seconds for _, _, seconds in answers) < 1


def test_more_silent_connections_than_the_limit_do_not_delay_the_health_check(
    monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    monkeypatch.setattr(app, "connection_limit", lambda: 150)  # gevent accepts up to 100 at once
    port = request.getfixturevalue("port")
    with contextlib.ExitStack() as silent:
        opened = [silent.enter_context(socket.create_connection(("127.0.0.1", port), 10)) for _ in range(400)]
        status, _, seconds = get(port)
        assert (status, seconds < 1) == (200, True)
        assert opened[0].recv(1) == b"", "the oldest was closed"


def test_connections_that_have_ended_do_not_count(
    monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    monkeypatch.setattr(app, "connection_limit", lambda: 10)
    port = request.getfixturevalue("port")
    with socket.create_connection(("127.0.0.1", port), 10) as silent:
        assert [get(port)[0] for _ in range(30)] == [200] * 30
        silent.settimeout(0.2)
        with pytest.raises(TimeoutError):
            silent.recv(1)


@pytest.mark.parametrize(
    ("soft", "hard", "raised_to", "allowed"),
    [(1024, 524288, 4500, 4000), (1024, 1024, 1024, 524), (1048576, 1048576, 1048576, 4000), (256, 256, 256, 1)],
)
def test_limit_of_connections_reserves_open_files_for_the_process(
    monkeypatch: pytest.MonkeyPatch, soft: int, hard: int, raised_to: int, allowed: int
) -> None:
    limits = [(soft, hard)]
    monkeypatch.setattr(app.resource, "getrlimit", lambda kind: limits[-1])
    monkeypatch.setattr(app.resource, "setrlimit", lambda kind, limit: limits.append(limit))
    assert app.connection_limit() == allowed
    assert limits[-1] == (raised_to, hard)


@pytest.mark.parametrize("sent", [b"", b"GET /sync HTTP/1.1\r\nX: y"], ids=["silent", "half a request"])
def test_client_that_does_not_finish_its_request_is_disconnected(
    port: int, sent: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(app, "REQUEST_SECONDS", 0.3)
    with socket.create_connection(("127.0.0.1", port), 10) as connection:
        connection.sendall(sent)
        began = time.monotonic()
        while connection.recv(1000):
            pass
    assert 0.1 < time.monotonic() - began < 5


def test_client_that_sends_its_request_slowly_is_disconnected(port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(app, "REQUEST_SECONDS", 0.3)
    with socket.create_connection(("127.0.0.1", port), 10) as connection, pytest.raises(OSError, match=r"pipe|reset"):
        for _ in range(100):
            connection.sendall(b"G")
            time.sleep(0.05)


def test_headers_have_a_limit_so_that_clients_cannot_use_up_the_memory(port: int) -> None:
    with socket.create_connection(("127.0.0.1", port), 10) as connection:
        connection.sendall(b"GET /sync HTTP/1.1\r\nX: " + b"x" * app.HEADERS_MAX)  # more would follow
        assert connection.recv(1000).startswith(b"HTTP/1.1 400 ")
    assert get(port)[0] == 200


def test_malformed_headers_are_answered_and_not_logged(port: int, capfd: pytest.CaptureFixture[str]) -> None:
    with socket.create_connection(("127.0.0.1", port), 10) as connection:
        connection.sendall(b"GET /sync HTTP/1.1\r\n" + b"X: y\r\n" * 200 + b"\r\n")
        assert connection.recv(1000).startswith(b"HTTP/1.1 400 ")
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("sent", [b"GET / HTTP/1.1\r\nContent-Length: -1\r\n\r\n", b"GET / HTTP/1.1\r\nHo"])
def test_client_that_resets_its_connection_instead_of_reading_a_refusal_is_not_logged(
    port: int, capfd: pytest.CaptureFixture[str], sent: bytes
) -> None:
    for _ in range(50):
        with socket.create_connection(("127.0.0.1", port), 10) as connection:
            connection.sendall(sent)
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
    assert get(port)[0] == 200
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("body", [b"\r\n", b"5\r\n"], ids=["malformed", "incomplete"])
def test_client_with_an_invalid_body_is_disconnected_and_not_logged(
    port: int, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], body: bytes
) -> None:
    monkeypatch.setattr(app, "REQUEST_SECONDS", 0.3)
    with socket.create_connection(("127.0.0.1", port), 10) as connection:
        connection.sendall(CHUNKED + body)
        while connection.recv(1000):
            pass
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize(("begun", "repeated"), WITHOUT_PAUSE)
def test_client_that_sends_without_pause_does_not_delay_others(port: int, begun: bytes, repeated: bytes) -> None:
    with without_pause(port, begun, repeated):
        assert max(get(port)[2] for _ in range(3)) < 4  # else it would last as long as the client sends
