"""The manager's listeners with real sockets: idle, slow, flooding and malformed clients, long polls, and the end."""

from __future__ import annotations

import json
import logging
import os
import resource
import shutil
import signal
import socket
import ssl
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from certificates import make_certificate
from core.scaler import Policy
from fakes import TOKEN, Clock, FakeEngine, controller, eventually
from manager_client import ManagerClient
from web import listeners as module
from web.app import as_operator, create_app, waits_in
from web.http_server import BODY_MAX, HEADERS_MAX, Limits
from web.listeners import Listeners, bind_tcp, bind_unix, connections_each, tls_context

BEARER = f"Authorization: Bearer {TOKEN}\r\n"
REPORT = {"balancer": "b1", "revision": "r", "interval": 2, "backends": []}
QUICK = Limits(request=0.3, answer=0.3)
LONG = Limits(request=60, answer=60)


def request(method: str, path: str, body: bytes = b"", headers: str = BEARER, version: str = "1.1") -> bytes:
    length = f"Content-Length: {len(body)}\r\n" if body else ""
    return f"{method} {path} HTTP/{version}\r\nHost: localhost\r\n{headers}{length}\r\n".encode() + body


STATUS = request("GET", "/status", headers="Connection: close\r\n")
A_REPORT = request("POST", "/pkts_info", json.dumps(REPORT).encode(), f"{BEARER}Connection: close\r\n")


class Site:
    """A manager over a fake engine, on TCP, TLS and Unix socket listeners, and its clients."""

    def __init__(self, place: Path, limits: Limits | None = None) -> None:
        self.controller = controller(FakeEngine("p-backend-1", "p-backend-2"), place, Clock())
        self.controller.adopt(None)
        self.listeners = Listeners(limits)
        self.controller.subscribe(self.listeners.notify)
        wait = waits_in(self.listeners, self.controller)
        app = create_app(self.controller, TOKEN, [], wait, compute=self.listeners.compute)
        tcp, secured, self.unix = bind_tcp("127.0.0.1", 0), bind_tcp("127.0.0.1", 0), place / "manager.sock"
        self.tcp, self.tls = tcp.getsockname()[1], secured.getsockname()[1]
        self.pem = certificate(place)
        self.listeners.add(tcp, app)
        self.listeners.add(secured, app, tls_context(self.pem))
        self.listeners.add(bind_unix(self.unix), as_operator(app))
        self.listeners.start()
        self._sockets = ExitStack()

    def close(self) -> None:
        self._sockets.close()
        self.controller.close()
        self.listeners.stop()

    def connect(self, port: int = 0) -> socket.socket:
        """A client that has sent nothing, also no TLS handshake."""
        return self._sockets.enter_context(socket.create_connection(("127.0.0.1", port or self.tcp), 20))

    def connect_tls(self) -> socket.socket:
        context = ssl.create_default_context(cafile=str(self.pem))
        wrapped = context.wrap_socket(self.connect(self.tls), server_hostname="lbscaler-manager")
        return self._sockets.enter_context(wrapped)

    def connect_unix(self) -> socket.socket:
        client = self._sockets.enter_context(socket.socket(socket.AF_UNIX))
        client.settimeout(20)
        client.connect(str(self.unix))
        return client

    def request(self, sent: bytes = STATUS, connect: Callable[[], socket.socket] | None = None) -> tuple[int, bytes]:
        """(status, body) of the answer, read until the connection ends; status 0 for no answer."""
        with (connect or self.connect)() as client:
            client.sendall(sent)
            return parsed(until_end(client))

    def long_poll(self, connect: Callable[[], socket.socket] | None = None) -> socket.socket:
        client = (connect or self.connect)()
        revision = self.controller.status()["revision"]
        client.sendall(request("GET", f"/sync?have={revision}&wait=60", headers=f"{BEARER}Connection: close\r\n"))
        return client


def certificate(place: Path) -> Path:
    if not shutil.which("openssl"):
        pytest.skip("needs openssl")
    return make_certificate(place)


def until_end(client: socket.socket) -> bytes:
    """All bytes until the connection ends, also by a reset."""
    received = b""
    with suppress(ConnectionResetError):
        while piece := client.recv(1 << 16):
            received += piece
    return received


def parsed(answer: bytes) -> tuple[int, bytes]:
    head, _, body = answer.partition(b"\r\n\r\n")
    return int(head.split()[1]) if head else 0, body


def seconds(call: Callable[[], object]) -> float:
    began = time.monotonic()
    call()
    return time.monotonic() - began


@pytest.fixture
def begin(tmp_path: Path) -> Iterator[Callable[..., Site]]:
    with ExitStack() as sites:

        def begin(limits: Limits | None = None) -> Site:
            site = Site(tmp_path, limits)
            sites.callback(site.close)
            return site

        yield begin


@pytest.fixture
def silent_logs(caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]) -> Callable[[], None]:
    """Asserts that nothing was logged or printed."""
    caplog.set_level(logging.WARNING)

    def nothing() -> None:
        assert (caplog.text, *capfd.readouterr()) == ("", "", "")

    return nothing


# -- many clients -----------------------------------------------------------------------------------------------------

POLLS, IDLE, NEEDED_FILES = 1000, 2000, 12_000


@pytest.fixture
def many_files() -> Iterator[None]:
    """Both ends of all connections are in this process."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard < NEEDED_FILES:
        pytest.skip(f"needs {NEEDED_FILES} open files, the hard limit is {hard}")
    module.raise_file_limit()
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def memory() -> int:
    """MB of this process."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() >> 20


@pytest.mark.slow
def test_reports_and_status_are_fast_during_a_thousand_long_polls_and_idle_connections(
    begin: Callable[..., Site], many_files: None, figure: Callable[[str], None]
) -> None:
    site, before, threads = begin(), memory(), threading.active_count()
    polls = [site.long_poll() for _ in range(POLLS // 2)]
    polls += [site.long_poll(site.connect_tls) for _ in range(POLLS // 2)]
    idle = [site.connect(port) for _ in range(IDLE) for port in (site.tcp, site.tls)]
    worst = {"GET /status": 0.0, "POST /pkts_info": 0.0}
    for _ in range(10):
        for connect in (site.connect, site.connect_tls):
            for name, sent in (("GET /status", STATUS), ("POST /pkts_info", A_REPORT)):
                began = time.monotonic()
                assert site.request(sent, connect)[0] == 200
                worst[name] = max(worst[name], time.monotonic() - began)
    assert threading.active_count() == threads, "connections have no threads"
    for client in (idle[0], idle[-1]):
        client.setblocking(False)
        with pytest.raises(BlockingIOError):
            client.recv(1)  # it is still connected
    held = memory() - before
    site.controller.drain("198.18.0.2")
    at_change = seconds(lambda: site.request(A_REPORT))
    answers = [parsed(until_end(poll)) for poll in polls]
    assert all(status == 200 and b"draining" in body for status, body in answers)
    figure(
        f"{POLLS} long polls, {len(idle)} idle connections: worst answer of "
        + ", ".join(f"{name} {took:.3f} s" for name, took in worst.items())
        + f"; of a report when all polls are answered {at_change:.2f} s; {held} MB for both ends"
    )
    assert max(*worst.values(), at_change) < 1


def test_more_idle_connections_than_the_limit_do_not_block_others(begin: Callable[..., Site]) -> None:
    site = begin(Limits(connections=40, request=60))
    first = site.connect()
    for _ in range(100):
        site.connect()
    assert seconds(site.request) < 5
    assert until_end(first) == b"", "the longest idle connection is closed"


def test_more_idle_connections_than_the_limit_do_not_block_others_with_tls(begin: Callable[..., Site]) -> None:
    site = begin(Limits(connections=40, request=60))
    for _ in range(100):
        site.connect(site.tls)
    assert seconds(lambda: site.request(connect=site.connect_tls)) < 5


def test_a_long_poll_is_not_closed_in_favour_of_idle_connections(begin: Callable[..., Site]) -> None:
    site = begin(Limits(connections=40, request=60))
    poll = site.long_poll()
    for _ in range(100):
        site.connect()
    assert site.request()[0] == 200
    site.controller.drain("198.18.0.2")
    assert parsed(until_end(poll))[0] == 200


def test_long_polls_that_fill_one_listener_do_not_block_another(begin: Callable[..., Site]) -> None:
    site = begin(Limits(connections=16))
    for _ in range(50):
        site.long_poll()
    for connect in (site.connect_tls, site.connect_unix):
        assert seconds(lambda connect=connect: site.request(connect=connect)) < 1


def test_replays_do_not_block_others_and_run_one_at_a_time(
    begin: Callable[..., Site], monkeypatch: pytest.MonkeyPatch
) -> None:
    site, released, begun = begin(), threading.Event(), []

    def replay(policy: Policy) -> list[int]:
        begun.append(policy)
        released.wait(10)
        return [len(begun)]

    monkeypatch.setattr(site.controller, "what_if", replay)
    clients = [site.connect(), site.connect()]
    for client in clients:
        client.sendall(request("GET", "/what-if", headers="Connection: close\r\n"))
    assert eventually(lambda: begun)
    assert seconds(site.request) < 1
    assert not eventually(lambda: len(begun) > 1, within=0.3)
    released.set()
    assert {parsed(until_end(client)) for client in clients} == {(200, b"[1]\n"), (200, b"[2]\n")}


def test_replays_of_one_caller_cannot_use_up_the_connections_because_only_a_few_wait(
    begin: Callable[..., Site], monkeypatch: pytest.MonkeyPatch
) -> None:
    site, released = begin(Limits(connections=16)), threading.Event()
    monkeypatch.setattr(site.controller, "what_if", lambda policy: released.wait(10))
    sent = request("GET", "/what-if", headers="Connection: close\r\n")
    clients = [site.connect() for _ in range(40)]
    for client in clients:
        client.sendall(sent)
    try:
        assert seconds(site.request) < 1
    finally:
        released.set()
    busy = (503, b"other callers replay the load; retry in a few seconds\n")
    answers = [parsed(until_end(client)) for client in clients]
    assert answers.count((200, b"true\n")) == module.COMPUTING_MAX
    assert answers.count(busy) == 40 - module.COMPUTING_MAX
    assert site.request(sent)[0] == 200


# -- slow clients -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "sent",
    [
        b"",
        b"GET /status HT",
        b"GET /status HTTP/1.1\r\nHost: localhost\r\n",
        b"POST /stop HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9\r\n\r\n{",
        b"POST /stop HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n5\r\n{",
    ],
)
def test_a_client_that_does_not_complete_its_request_in_time_is_disconnected(
    begin: Callable[..., Site], silent_logs: Callable[[], None], sent: bytes
) -> None:
    site = begin(QUICK)
    for connect in (site.connect, site.connect_tls, site.connect_unix):
        client = connect()
        client.sendall(sent)
        assert 0.2 < seconds(lambda client=client: until_end(client)) < 3
    silent_logs()


@pytest.mark.parametrize(
    "begun", [b"", b"GET /status HTTP/1.1\r\nX: ", b"POST /stop HTTP/1.1\r\nContent-Length: 9999\r\n\r\n"]
)
def test_a_client_that_sends_single_bytes_is_disconnected(begin: Callable[..., Site], begun: bytes) -> None:
    client, deadline = begin(QUICK).connect(), time.monotonic() + 3
    client.sendall(begun)
    client.settimeout(0.05)
    with pytest.raises(OSError):
        while time.monotonic() < deadline:
            client.sendall(b"a")
            with suppress(TimeoutError):
                assert client.recv(1) == b""
    assert time.monotonic() < deadline


def test_a_connection_is_kept_for_the_next_request_and_ends_when_none_comes(begin: Callable[..., Site]) -> None:
    client = begin(QUICK).connect()
    for _ in range(3):
        client.sendall(request("GET", "/decisions", headers=""))
        received = b""
        while not received.endswith(b"\r\n\r\n[]\n"):
            received += client.recv(1 << 16)
        time.sleep(0.15)
    assert seconds(lambda: until_end(client)) < 3


def test_an_answer_on_a_kept_connection_does_not_wait_for_an_acknowledgement(begin: Callable[..., Site]) -> None:
    client, began = begin().connect(), time.monotonic()
    for _ in range(30):
        client.setsockopt(socket.IPPROTO_TCP, socket.TCP_QUICKACK, 0)  # acknowledges after 40 ms
        client.sendall(request("GET", "/decisions", headers=""))
        received = b""
        while not received.endswith(b"\r\n\r\n[]\n"):
            received += client.recv(1 << 16)
    assert time.monotonic() - began < 0.6


def test_a_client_that_does_not_complete_the_tls_handshake_is_disconnected(
    begin: Callable[..., Site], silent_logs: Callable[[], None]
) -> None:
    site = begin(QUICK)
    client = site.connect(site.tls)
    assert 0.2 < seconds(lambda: until_end(client)) < 3
    for sent in (STATUS, b"\x16\x03\x01\xff\xff", b"\x16\x03\x01\x00\x05\x01\x00\x00\x01\x00"):
        client = site.connect(site.tls)
        client.sendall(sent)
        assert b"200" not in until_end(client)
    reset(site.connect(site.tls))
    assert site.request(connect=site.connect_tls)[0] == 200
    silent_logs()


@pytest.mark.parametrize(("path", "times"), [("/plotly.js", 1), ("/page.js", 2000)])
def test_a_client_that_does_not_read_answers_is_disconnected(
    begin: Callable[..., Site], silent_logs: Callable[[], None], path: str, times: int
) -> None:
    site = begin(QUICK)
    whole = len(site.request(request("GET", path, headers="Connection: close\r\n"))[1]) * times
    for connect in (site.connect, site.connect_tls):
        client = connect()
        client.settimeout(1)
        with suppress(TimeoutError):
            client.sendall(request("GET", path) * times)
        time.sleep(1)
        assert 0 < len(until_end(client)) < whole
    silent_logs()


def test_a_client_that_does_not_read_headers_is_disconnected() -> None:
    def long_headers(environ: Any, start_response: Any) -> list[bytes]:
        start_response("200 OK", [("X", "x" * 20_000_000)])
        return [b"x"]

    with serving(long_headers, QUICK) as port:
        before = open_files()
        with socket.create_connection(("127.0.0.1", port), 5) as client:
            assert eventually(lambda: open_files() == before + 2), "accepted"
            client.sendall(STATUS)
            assert eventually(lambda: open_files() == before + 1), "closed, although most of the answer was not read"
            assert until_end(client).endswith(b"xxx"), "no second answer within the first"


def open_files() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


@contextmanager
def serving(application: Any, limits: Limits | None = None) -> Iterator[int]:
    """A listener alone; its port."""
    made, listener = Listeners(limits), bind_tcp("127.0.0.1", 0)
    port = listener.getsockname()[1]
    made.add(listener, application)
    made.start()
    yield port
    made.stop()


def test_clients_that_do_not_read_answers_cost_little_memory(begin: Callable[..., Site]) -> None:
    site = begin(Limits(connections=30, request=60, answer=60))
    site.request(request("GET", "/plotly.js", headers="Connection: close\r\n"))
    before = memory()
    for _ in range(60):
        site.connect().sendall(request("GET", "/plotly.js"))
    assert seconds(site.request) < 5
    assert memory() - before < 50, "all answers share one copy"


# -- flooding clients ------------------------------------------------------------------------------------------------


# Sends the first argument, then the second again and again, both hexadecimal, and discards all answers.
ENDLESS = """
import contextlib, socket, sys, threading
client = socket.create_connection(("127.0.0.1", int(sys.argv[1])))
def read():
    with contextlib.suppress(OSError):
        while client.recv(1 << 16):
            pass
threading.Thread(target=read, daemon=True).start()
with contextlib.suppress(OSError):
    client.sendall(bytes.fromhex(sys.argv[2]))
    print("begun", flush=True)
    while True:
        client.sendall(bytes.fromhex(sys.argv[3]))
"""


CHUNKED = b"POST /stop HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n"


@pytest.mark.parametrize(
    ("begun", "piece"),
    [
        (b"", b"HEAD /nowhere HTTP/1.1\r\n\r\n" * 500),
        (CHUNKED + b"0\r\n", b"a: b\r\n" * 1000),
        (CHUNKED, (b"1;" + b"x" * 8000 + b"\r\na\r\n") * 6),
        (b"POST /stop HTTP/1.1\r\nContent-Length: 99999999999\r\n\r\n", b"x" * 10_000),
    ],
    ids=["requests", "trailers", "chunk extensions", "a body too long"],
)
def test_a_client_that_sends_without_pause_does_not_keep_others_waiting(
    begin: Callable[..., Site], begun: bytes, piece: bytes
) -> None:
    site = begin(LONG)
    argv = [sys.executable, "-c", ENDLESS, str(site.tcp), begun.hex(), piece.hex()]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, text=True) as sender:
        try:
            assert sender.stdout is not None
            assert sender.stdout.readline() == "begun\n"
            time.sleep(0.2)
            assert max(seconds(lambda: site.request(A_REPORT)) for _ in range(5)) < 2
        finally:
            sender.kill()


def test_bodies_have_a_limit_in_all_and_the_oldest_connection_is_closed(
    begin: Callable[..., Site], silent_logs: Callable[[], None]
) -> None:
    site = begin(Limits(request=60, bodies=BODY_MAX))
    half = request("POST", "/pkts_info", b" " * BODY_MAX)[: BODY_MAX // 2]
    clients = [site.connect() for _ in range(4)]
    for client in clients:
        client.sendall(half)
        time.sleep(0.1)
    whole = request(
        "POST", "/pkts_info", json.dumps(REPORT).encode().ljust(BODY_MAX - 10), f"{BEARER}Connection: close\r\n"
    )
    assert site.request(whole)[0] == 200
    assert [until_end(client) for client in clients[:3]] == [b""] * 3
    assert site.request()[0] == 200
    silent_logs()


@pytest.mark.parametrize("length", [BODY_MAX + 1, 3 * BODY_MAX, 10**30])
def test_a_body_that_is_too_long_is_refused_and_the_client_gets_the_answer(
    begin: Callable[..., Site], length: int
) -> None:
    site = begin()
    sent = f"POST /stop HTTP/1.1\r\nHost: localhost\r\nContent-Length: {length}\r\n\r\n".encode()
    client = site.connect()
    client.sendall(sent + b" " * min(length, 3 * BODY_MAX))
    assert parsed(until_end(client)) == (413, b"Request Entity Too Large\n")


def test_a_chunked_body_is_read_and_one_that_is_too_long_is_refused(begin: Callable[..., Site]) -> None:
    site, headers = begin(), f"{BEARER}Transfer-Encoding: chunked\r\nConnection: close\r\n"
    body = json.dumps(REPORT).encode()
    chunks = b"%x\r\n%b\r\n%x;a=b\r\n%b\r\n0\r\nTrailer: x\r\n\r\n" % (10, body[:10], len(body) - 10, body[10:])
    head = request("POST", "/pkts_info", headers=headers)
    assert site.request(head + chunks)[0] == 200
    too_long = b"10000\r\n" + b" " * 65536 + b"\r\n"
    assert site.request(head + too_long * 17) == (413, b"Request Entity Too Large\n")


# -- malformed requests ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sent", "status"),
    [
        (b"\r\n\r\n", 400),
        (b"\x00\xff\x16\r\n\r\n", 400),
        (b"GET /\r\n\r\n", 400),  # HTTP/0.9
        (b"POST /stop\r\n\r\n", 400),
        (b"GET / HTTP/2.0\r\n\r\n", 400),
        (b"GET / HTTP/x.y\r\n\r\n", 400),
        (b"GET / FTP/1.1\r\n\r\n", 400),
        (b"GET / a HTTP/1.1\r\n\r\n", 400),
        (b"GET /" + b"x" * 9000 + b" HTTP/1.1\r\n\r\n", 414),
        (b"GET / HTTP/1.1\r\nX: " + b"x" * HEADERS_MAX + b"\r\n\r\n", 431),
        (b"GET / HTTP/1.1\r\n" + b"X: x\r\n" * 5000 + b"\r\n", 431),
        (b"GET / HTTP/1.1\r\n" + b"X: x\r\n" * 101 + b"\r\n", 400),
        (b"GET / HTTP/1.1\r\nConnection: close\r\nno header\r\n\r\n", 200),
        (b"GET / HTTP/1.1\r\nConnection: close\r\n\xff: \xff\r\n x\r\n: x\r\n\r\n", 200),
        (b"POST /stop HTTP/1.1\r\nContent-Length: x\r\n\r\n", 400),
        (b"POST /stop HTTP/1.1\r\nContent-Length: -1\r\n\r\n", 400),
        (b"POST /stop HTTP/1.1\r\nContent-Length: " + b"9" * 5000 + b"\r\n\r\n", 400),
        (b"HEAD / HTTP/1.1\r\nContent-Length: 4\r\n\r\nabcd", 400),
        (b"POST /stop HTTP/1.1\r\nTransfer-Encoding: gzip, chunked\r\n\r\n", 501),
        (CHUNKED + b"\r\n\r\n", 400),
        (CHUNKED + b"zz\r\n\r\n", 400),
        (CHUNKED + b"-1\r\n\r\n", 400),
        (CHUNKED + b"f" * 17 + b"\r\n\r\n", 400),
        (CHUNKED + b"3\r\nabcd\r\n\r\n", 400),
        (CHUNKED + b"0\r\n\xff: x\r\n\r\n", 400),
        (CHUNKED + b"3;" + b"x" * 9000, 400),
        (b"GET /status HTTP/1.1\r\nHost: localhost\r\nUpgrade: websocket\r\nConnection: close\r\n\r\n", 200),
        (b"GET http://localhost/status HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n", 404),
        (b"GET /%00%ff?%ff=%ff HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n", 404),
        (b"GET /sync?\xff HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n", 400),
    ],
)
def test_a_malformed_request_is_refused_and_not_logged(
    begin: Callable[..., Site], silent_logs: Callable[[], None], sent: bytes, status: int
) -> None:
    site = begin(QUICK)
    got, body = site.request(sent)
    assert got == status
    assert status < 400 or len(body.splitlines()) == 1
    assert site.request()[0] == 200
    silent_logs()


def reset(client: socket.socket) -> None:
    client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
    client.close()


def test_a_reset_by_a_client_is_not_logged(begin: Callable[..., Site], silent_logs: Callable[[], None]) -> None:
    site = begin(QUICK)
    polling = [site.long_poll() for _ in range(3)]
    for sent in (b"", b"GET /sta", request("POST", "/stop", b"x" * 50)[:-9], STATUS, request("GET", "/plotly.js")):
        for connect in (site.connect, site.connect_tls):
            client = connect()
            client.sendall(sent)
            time.sleep(0.02)
            reset(client)
    for poll in polling:
        reset(poll)
    site.controller.drain("198.18.0.2")
    assert site.request()[0] == 200
    time.sleep(0.5)
    silent_logs()


def test_a_request_with_incomplete_headers_is_not_handled(begin: Callable[..., Site]) -> None:
    site = begin()
    client = site.connect()
    client.sendall(request("POST", "/stop", headers=BEARER)[:-2])
    client.shutdown(socket.SHUT_WR)
    assert until_end(client) == b""


def test_an_error_of_the_application_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    def failing(environ: Any, start_response: Any) -> Any:
        raise KeyError("a mistake")

    with serving(failing) as port, socket.create_connection(("127.0.0.1", port), 5) as client:
        client.sendall(STATUS)
        assert parsed(until_end(client))[0] == 500
    assert "a connection failed" in caplog.text
    assert "a mistake" in caplog.text


# -- valid requests --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("version", ["1.0", "1.1"])
def test_both_http_versions_are_answered_and_the_connection_closed_on_request(
    begin: Callable[..., Site], version: str
) -> None:
    site = begin()
    headers = "Connection: close, TE\r\n" if version == "1.1" else ""
    for connect in (site.connect, site.connect_tls, site.connect_unix):
        began = time.monotonic()
        status, body = site.request(request("GET", "/status", headers=headers, version=version), connect)
        assert (status, json.loads(body)["project"]) == (200, "p")
        assert time.monotonic() - began < 3


def test_connection_close_is_confirmed_and_the_connection_closed(begin: Callable[..., Site]) -> None:
    site = begin()
    manager = ManagerClient([f"127.0.0.1:{site.tls}"], lambda: TOKEN, str(site.pem))  # as in a balancer
    for _ in range(300):
        manager.report(REPORT)  # raises for any answer but success
    for version in ("1.0", "1.1"):
        client = site.connect()
        client.sendall(request("GET", "/status", headers="Connection: close\r\n", version=version))
        assert until_end(client).partition(b"\r\n\r\n")[0].lower().count(b"\r\nconnection: close") == 1


def test_expect_100_continue_is_answered_before_the_body_is_sent(begin: Callable[..., Site]) -> None:
    client, body = begin().connect(), json.dumps(REPORT).encode()
    sent = request("POST", "/pkts_info", body, f"{BEARER}Expect: 100-continue\r\nConnection: close\r\n")
    client.sendall(sent[: -len(body)])
    assert client.recv(100) == b"HTTP/1.1 100 Continue\r\n\r\n"
    client.sendall(body)
    assert parsed(until_end(client))[0] == 200


def test_operator_calls_need_the_unix_socket(begin: Callable[..., Site]) -> None:
    site, pause = begin(), request("POST", "/pause", headers=f"{BEARER}Lbscaler.operator: 1\r\nConnection: close\r\n")
    assert site.request(pause)[0] == site.request(pause, site.connect_tls)[0] == 403
    assert site.request(pause, site.connect_unix)[0] == 200


def test_the_unix_socket_is_created_with_mode_0600(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    modes: list[int] = []

    class Watched(socket.socket):
        def bind(self, address: Any) -> None:
            super().bind(address)
            modes.append(stat.S_IMODE(Path(address).stat().st_mode))

    monkeypatch.setattr(module.socket, "socket", Watched)
    before = os.umask(0)
    try:
        bind_unix(tmp_path / "manager.sock").close()
        bind_unix(tmp_path / "manager.sock").close()  # replaces the file of an earlier manager
    finally:
        os.umask(before)
    assert modes == [0o600, 0o600]


def test_a_listener_can_be_bound_before_its_address_exists() -> None:
    bind_tcp("198.18.99.1", 0).close()
    with pytest.raises(OSError, match="in use"), bind_tcp("127.0.0.1", 0) as taken:
        bind_tcp("127.0.0.1", taken.getsockname()[1])


def test_tls_before_1_2_and_a_file_without_a_key_are_refused(begin: Callable[..., Site], tmp_path: Path) -> None:
    site = begin()
    context = ssl.create_default_context(cafile=str(site.pem))
    with pytest.warns(DeprecationWarning):
        context.minimum_version = context.maximum_version = ssl.TLSVersion.TLSv1_1
    context.set_ciphers("ALL:@SECLEVEL=0")
    with pytest.raises(OSError):
        context.wrap_socket(site.connect(site.tls), server_hostname="lbscaler-manager").close()
    (tmp_path / "empty.pem").write_text("")
    with pytest.raises(OSError, match="PEM"):
        tls_context(tmp_path / "empty.pem")


@pytest.mark.parametrize(
    ("files", "listeners", "connections"), [(20_000, 3, 4096), (4096, 3, 1194), (1024, 3, 170), (256, 3, 16)]
)
def test_connections_leave_file_descriptors_for_everything_else(files: int, listeners: int, connections: int) -> None:
    assert connections_each(4096, files, listeners) == connections


def test_the_limit_of_open_files_is_raised_up_to_the_hard_limit() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(soft, 1024), hard))
    try:
        module.raise_file_limit()
        assert resource.getrlimit(resource.RLIMIT_NOFILE) == (hard, hard)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


# -- the end ----------------------------------------------------------------------------------------------------------


def test_an_ending_manager_refuses_long_polls_once_and_then_closes(begin: Callable[..., Site]) -> None:
    site = begin()
    refused = (503, b"the manager is ending; retry in a few seconds\n")
    waiting = [site.long_poll(), site.long_poll(site.connect_tls)]
    time.sleep(0.2)
    site.controller.close()
    assert [parsed(until_end(poll)) for poll in waiting] == [refused, refused]
    assert parsed(until_end(site.long_poll())) == refused
    idle = site.connect()
    assert seconds(site.listeners.stop) < 3
    assert until_end(idle) == b""
    with pytest.raises(ConnectionRefusedError):
        site.connect()
    site.listeners.notify()  # has no effect after the end


def test_listeners_that_cannot_start_raise_the_error(tmp_path: Path) -> None:
    made, closed = Listeners(), bind_tcp("127.0.0.1", 0)
    closed.close()
    made.add(closed, lambda *_: [])
    with pytest.raises(OSError):
        made.start()
    made.stop()


MANAGER = """
import sys
from pathlib import Path
from core import settings
from core.engine import TakenOver
settings.ROOT = Path(sys.argv.pop(1))
import fakes, script
class Engine(fakes.FakeEngine):
    def __init__(self, *_):
        super().__init__("p-backend-1", "p-backend-2")
    def gateway(self):
        return "127.0.0.2"
script.DockerEngine = script.SwarmEngine = Engine
def be_taken_over(self):
    raise TakenOver("the manager at another-host has taken over; this one ends")
match sys.argv[1:]:
    case ["listeners fail"]:
        script.Listeners.is_alive = lambda self: False
    case ["loop fails"]:
        script.Controller.run = lambda self: None
    case ["taken over"]:
        script.Controller.step = be_taken_over
del sys.argv[1:]
sys.exit(script.main())
"""


class ManagerProcess:
    """The manager in its own process, over a fake engine."""

    def __init__(self, place: Path, orchestrator: str = "docker", *arguments: str) -> None:
        self.run_dir = place / "run" / "p"
        (self.run_dir / "balancer").mkdir(parents=True, exist_ok=True)
        (self.run_dir / "token").write_text(TOKEN)
        with bind_tcp("127.0.0.1", 0) as free:
            self.port = free.getsockname()[1]
        chosen = {"LB_PROJECT": "p", "LB_MANAGER_PORT": str(self.port), "LB_ORCHESTRATOR": orchestrator}
        chosen |= {"LB_BALANCER_IMAGE": "image", "LB_TOKEN_SECRET": "token", "LB_CERTIFICATE_SECRET": "certificate"}
        path = os.pathsep.join(str(Path(__file__).parents[3] / name) for name in ("manager", "tests"))
        argv = [sys.executable, "-c", MANAGER, str(place), *arguments]
        self.process = subprocess.Popen(argv, env={**os.environ, **chosen, "PYTHONPATH": path})

    def log(self) -> str:
        log = self.run_dir / "manager.log"
        return log.read_text() if log.exists() else ""

    def status(self, address: str = "127.0.0.1") -> int:
        with socket.create_connection((address, self.port), 5) as client:
            client.sendall(request("GET", "/status", headers=f"{BEARER}Connection: close\r\n"))
            return parsed(until_end(client))[0]


@pytest.fixture
def manager(tmp_path: Path) -> Iterator[Callable[..., ManagerProcess]]:
    with ExitStack() as started:

        def start(*arguments: str) -> ManagerProcess:
            made = ManagerProcess(tmp_path, *arguments)
            started.callback(made.process.wait)
            started.callback(made.process.kill)
            assert eventually(lambda: "manager started" in made.log(), within=20)
            return made

        yield start


@pytest.mark.parametrize("end", [signal.SIGTERM, signal.SIGINT])
def test_a_suspended_and_resumed_manager_runs_until_it_gets_a_signal_to_end(
    manager: Callable[..., ManagerProcess], end: signal.Signals
) -> None:
    made = manager()
    made.process.send_signal(signal.SIGSTOP)
    time.sleep(2)
    made.process.send_signal(signal.SIGCONT)
    time.sleep(0.5)
    assert made.process.poll() is None, "neither SIGSTOP nor SIGCONT ends it"
    assert made.status() == made.status("127.0.0.2") == 200
    made.process.send_signal(end)
    assert made.process.wait(10) == 0
    assert "manager ended" in made.log()


@pytest.mark.parametrize(
    ("fault", "status", "line"),
    [
        ("listeners fail", 3, "the loop or the listeners have failed; this manager ends"),
        ("loop fails", 3, "the loop or the listeners have failed; this manager ends"),
        ("taken over", 4, "the manager at another-host has taken over; this one ends"),
    ],
)
def test_exit_status_of_a_manager_names_what_has_ended_it(
    manager: Callable[..., ManagerProcess], fault: str, status: int, line: str
) -> None:
    made = manager("docker", fault)
    assert made.process.wait(10) == status
    assert line in made.log()


def test_manager_removes_the_number_of_backends_that_it_has_taken(
    manager: Callable[..., ManagerProcess], tmp_path: Path
) -> None:
    number = tmp_path / "run" / "p" / "backends"
    number.parent.mkdir(parents=True)
    number.write_text("3")
    manager()
    assert not number.exists()


def test_in_a_swarm_the_node_address_has_tls(manager: Callable[..., ManagerProcess], tmp_path: Path) -> None:
    (tmp_path / "run" / "p").mkdir(parents=True)
    pem = certificate(tmp_path / "run" / "p")
    made = manager("swarm")
    assert ManagerClient([f"127.0.0.2:{made.port}"], lambda: TOKEN, str(pem)).sync("") is not None
    assert made.status() == 200
    assert made.status("127.0.0.2") == 0


def test_a_long_poll_may_last_longer_than_a_request_and_ends_with_a_notify(begin: Callable[..., Site]) -> None:
    site = begin(QUICK)
    poll = site.long_poll()
    time.sleep(4 * QUICK.request)
    began = time.monotonic()
    site.controller.drain("198.18.0.2")
    assert parsed(until_end(poll))[0] == 200
    assert time.monotonic() - began < 1
