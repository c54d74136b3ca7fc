"""Every HTTP listener with arbitrary bytes: it answers or closes the connection, writes nothing to its log, and still
serves the next client. See test_parsers.py for the corpus and for long runs."""

from __future__ import annotations

import logging
import re
import socket
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

import app as balancer_app
from fakes import TOKEN, Clock, FakeEngine, controller
from limited_server import LimitedServer
from servers import in_thread
from web.app import create_app, waits_in
from web.listeners import Listeners, bind_tcp

Start = Callable[[Path], tuple[int, Callable[[], None]]]  # returns the port, and a function that ends the server


def start_manager(place: Path) -> tuple[int, Callable[[], None]]:
    made = controller(FakeEngine("p-backend-1", "p-backend-2"), place, Clock())
    made.adopt(None)
    listeners = Listeners()
    listener = bind_tcp("127.0.0.1", 0)
    listeners.add(listener, create_app(made, TOKEN, [], waits_in(listeners, made)))
    listeners.start()
    return listener.getsockname()[1], listeners.stop


def start_balancer(_: Path) -> tuple[int, Callable[[], None]]:
    app = balancer_app.create_app(lambda: ({"revision": "r"}, 200), lambda: b"flows 3.0\n")
    return in_thread(lambda: balancer_app.make_server(app, "127.0.0.1", 0))


def start_sample_server(_: Path) -> tuple[int, Callable[[], None]]:
    def app(_environ: dict[str, Any], start_response: Any) -> list[bytes]:
        start_response("200 OK", [("Content-Type", "text/plain")])
        return [b"primes\n"]

    return in_thread(lambda: LimitedServer(("127.0.0.1", 0), app, 100, 5))


@pytest.fixture(scope="module", params=[start_manager, start_balancer, start_sample_server], ids=lambda f: f.__name__)
def port(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    number, end = request.param(tmp_path_factory.mktemp("listener"))
    yield number
    end()


def exchange(port: int, sent: bytes) -> bytes:
    """What the server answers until it closes the connection, which it does within its deadline of five seconds."""
    received = b""
    with socket.create_connection(("127.0.0.1", port), 10) as client:
        with suppress(OSError):  # the server has closed the connection already
            client.sendall(sent)
            client.shutdown(socket.SHUT_WR)
        with suppress(ConnectionResetError):
            while piece := client.recv(1 << 16):
                received += piece
    return received


LINES = [
    *(
        b"GET /sync HTTP/1.1\r\n",
        b"POST /pkts_info HTTP/1.1\r\n",
        b"GET /status?x=%00 HTTP/1.0\r\n",
        b"HEAD * HTTP/1.1\n",
    ),
    *(b"Host: localhost\r\n", b"Authorization: Bearer " + TOKEN.encode() + b"\r\n", b"Connection: close\r\n"),
    *(b"Content-Length: 5\r\n", b"Content-Length: 99999999999999999999\r\n", b"Content-Length: -1\r\n"),
    *(b"Transfer-Encoding: chunked\r\n", b"Transfer-Encoding: gzip\r\n", b"Expect: 100-continue\r\n", b"X: \xff\0\r\n"),
    *(b"\r\n", b"5\r\nhello\r\n", b"0\r\n\r\n", b"ffffffffffffffffff\r\n", b"-5\r\n", b"{}", b" ", b"\n"),
]


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.sampled_from(LINES) | st.binary(max_size=30), max_size=12).map(b"".join))
@example(b"")
@example(b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n")  # the beginning of TLS
@example(b"GET / HTTP/1.1\r\n: no name\r\n\r\n")
@example(b"GET / HTTP/1.1\r\n" + b"X: y\r\n" * 200 + b"\r\n")
@example(b"GET / HTTP/1.1\r\nX: " + b"y" * 70_000 + b"\r\n\r\n")
@example(b"GET /%s%d\xff HTTP/1.1\r\n\r\n")
@example(b"POST / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n-5\r\nhello\r\n")
@example(b"POST / HTTP/1.1\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n")
@example(b"GET / HTTP/1.1\r\n\r\n" * 50)
def test_listeners(port: int, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str], sent: bytes) -> None:
    answer = exchange(port, sent)
    assert re.match(rb"HTTP/1\.[01] (?!500)\d{3} |$", answer)
    assert b" 200 OK" in exchange(port, b"GET /sync HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
    assert [record for record in caplog.records if record.levelno >= logging.WARNING] == []
    assert capfd.readouterr().err == ""
