"""Probes of real sockets: what each answer means, and that a backend that hangs delays no other."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import threading
import time
from collections.abc import Callable, Iterator

import pytest

import prober
from exposition import FAILED_PROBES
from health import Answer, Cause, Health
from prober import Prober
from snapshot import Backend, Snapshot

GOOD = Answer()
REFUSED, FAILED = Cause.REFUSED, Cause.PROBE_FAILED


class Listener:
    """Listens on a loopback address and answers every request with `reply`, or with nothing."""

    def __init__(self, reply: bytes | None, ip: str = "127.0.0.1", port: int = 0) -> None:
        self.reply, self.requests = reply, 0
        self.first_line = b""
        self._socket = socket.create_server((ip, port))
        self.port = self._socket.getsockname()[1]
        self._open: list[socket.socket] = []
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def _serve(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                connection, _ = self._socket.accept()
                self.requests += 1
                if self.reply is None:
                    self._open.append(connection)
                    continue
                with connection, contextlib.suppress(OSError):
                    self.first_line = connection.recv(1000).split(b"\r\n")[0]
                    connection.sendall(self.reply)

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()
        self._thread.join(2)
        for connection in self._open:
            connection.close()


@pytest.fixture
def listen() -> Iterator[Callable[..., Listener]]:
    opened: list[Listener] = []

    def build(reply: bytes | None, ip: str = "127.0.0.1", port: int = 0) -> Listener:
        opened.append(Listener(reply, ip, port))
        return opened[-1]

    yield build
    for one in opened:
        one.close()


@pytest.fixture
def closed_port() -> Iterator[int]:
    """A port without a listener, which no other program can take."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        yield taken.getsockname()[1]


def http(status: str) -> bytes:
    return f"HTTP/1.1 {status}\r\nContent-Length: 3\r\nLocation: /elsewhere\r\n\r\nhi\n".encode()


@pytest.mark.parametrize(
    ("method", "reply", "cause", "request_line"),
    [
        ("sync", http("200 OK"), None, b"GET /sync HTTP/1.1"),
        ("sync", http("503 Service Unavailable"), REFUSED, b"GET /sync HTTP/1.1"),
        ("sync", http("404 Not Found"), FAILED, b"GET /sync HTTP/1.1"),
        ("sync", None, FAILED, b""),
        ("sync", b"", FAILED, b"GET /sync HTTP/1.1"),
        ("sync", b"SSH-2.0-OpenSSH_9.2\r\n", FAILED, b"GET /sync HTTP/1.1"),
        ("sync", b"HTTP/1.1 fine\r\n", FAILED, b"GET /sync HTTP/1.1"),
        ("sync", b"x" * 100_000, FAILED, b"GET /sync HTTP/1.1"),
        ("tcp", http("503 Service Unavailable"), None, b""),
        ("tcp", None, None, b""),
        ("http:/health?deep=1", http("200 OK"), None, b"GET /health?deep=1 HTTP/1.1"),
        ("http:/health", http("302 Found"), None, b"GET /health HTTP/1.1"),
        ("http:/health", http("404 Not Found"), FAILED, b"GET /health HTTP/1.1"),
        ("http:/health", http("503 Service Unavailable"), FAILED, b"GET /health HTTP/1.1"),
        ("http:/health", http("100 Continue"), FAILED, b"GET /health HTTP/1.1"),
        ("http:/health", None, FAILED, b""),
    ],
)
def test_meaning_of_an_answer_depends_on_the_health_setting(
    monkeypatch: pytest.MonkeyPatch,
    listen: Callable[..., Listener],
    closed_port: int,
    method: str,
    reply: bytes | None,
    cause: Cause | None,
    request_line: bytes,
) -> None:
    backend = listen(reply)
    port, sync_port = (closed_port, backend.port) if method == "sync" else (backend.port, closed_port)
    monkeypatch.setattr(prober, "SYNC_PORT", sync_port)
    monkeypatch.setattr(prober, "TIMEOUT", 0.15)
    began = time.monotonic()
    answer = asyncio.run(prober.probe("127.0.0.1", port, method))
    assert answer.cause is cause
    assert answer.timed_out == (reply is None and method != "tcp")
    assert time.monotonic() - began < 2
    assert backend.first_line == request_line


@pytest.mark.parametrize("method", ["sync", "tcp", "http:/health"])
def test_closed_port_is_a_failure(
    monkeypatch: pytest.MonkeyPatch, listen: Callable[..., Listener], closed_port: int, method: str
) -> None:
    other = listen(http("200 OK")).port
    port, sync_port = (other, closed_port) if method == "sync" else (closed_port, other)
    monkeypatch.setattr(prober, "SYNC_PORT", sync_port)
    assert asyncio.run(prober.probe("127.0.0.1", port, method)).cause is FAILED


class Watch:
    """A running prober with a short period, and how often it reported a change of health."""

    def __init__(self) -> None:
        self.changes = 0
        self.prober = Prober(self._count_change)
        self.prober.start()

    def _count_change(self) -> None:
        self.changes += 1

    def watch(self, backends: dict[str, str], port: int, method: str) -> None:
        """`backends` are id → address."""
        rows = tuple(Backend(id_, ip, "active") for id_, ip in backends.items())
        self.prober.watch(Snapshot("r1", rows, port, method))

    def healthy(self, id_: str) -> bool | None:
        return self.prober.health().get(id_, Health()).healthy

    def close(self) -> None:
        loop = self.prober._loop
        self.watch({}, 0, "tcp")
        loop.call_soon_threadsafe(loop.stop)
        self.prober.join(2)
        loop.run_until_complete(asyncio.sleep(0.01))  # lets the cancelled probes end
        loop.close()


@pytest.fixture
def watch(monkeypatch: pytest.MonkeyPatch) -> Iterator[Watch]:
    monkeypatch.setattr(Health, "pause", lambda self: 0.005)
    watch = Watch()
    yield watch
    watch.close()


def until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 5
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_backend_that_hangs_delays_no_other(
    monkeypatch: pytest.MonkeyPatch, listen: Callable[..., Listener], watch: Watch
) -> None:
    good = listen(http("200 OK"))
    monkeypatch.setattr(prober, "SYNC_PORT", good.port)
    monkeypatch.setattr(prober, "TIMEOUT", 60.0)
    hung = [listen(None, f"127.0.0.{number}", good.port) for number in range(2, 12)]
    watch.watch({**{f"hung{i}": f"127.0.0.{i + 2}" for i in range(10)}, "good": "127.0.0.1"}, 0, "sync")
    until(lambda: good.requests >= 5 and all(one.requests for one in hung))
    assert watch.healthy("good") is True
    assert [one.requests for one in hung] == [1] * 10  # each still in its first probe
    assert watch.healthy("hung0") is None


def test_each_change_of_health_is_reported_once(
    monkeypatch: pytest.MonkeyPatch, listen: Callable[..., Listener], watch: Watch
) -> None:
    backend = listen(http("200 OK"))
    watch.watch({"a": "127.0.0.1"}, backend.port, "http:/")
    until(lambda: backend.requests >= 4)
    assert (watch.healthy("a"), watch.changes) == (True, 1)
    backend.reply = http("500 Oops")
    until(lambda: watch.healthy("a") is False)
    seen = backend.requests
    until(lambda: backend.requests >= seen + 3)
    assert watch.changes == 2


def test_new_backend_on_an_old_address_starts_without_health(listen: Callable[..., Listener], watch: Watch) -> None:
    backend = listen(http("200 OK"))
    watch.watch({"old": "127.0.0.1"}, backend.port, "http:/")
    until(lambda: watch.healthy("old"))
    backend.reply = None
    watch.watch({"new": "127.0.0.1"}, backend.port, "http:/")
    until(lambda: "new" in watch.prober.health())
    assert watch.prober.health() == {"new": Health()}


def test_watched_backend_keeps_its_health_until_its_target_changes(
    listen: Callable[..., Listener], watch: Watch
) -> None:
    backend, other = listen(http("200 OK")), listen(None)
    watch.watch({"a": "127.0.0.1"}, backend.port, "http:/")
    until(lambda: watch.healthy("a"))
    changes = watch.changes
    watch.watch({"a": "127.0.0.1", "b": "127.0.0.1"}, backend.port, "http:/")
    until(lambda: watch.healthy("b") and watch.changes > changes)
    assert (watch.healthy("a"), watch.changes) == (True, changes + 1)
    watch.watch({"a": "127.0.0.1"}, other.port, "http:/")
    until(lambda: other.requests)
    seen = backend.requests
    time.sleep(0.1)
    assert backend.requests <= seen + 1  # one probe may have been in progress
    assert watch.healthy("a") is None


def probed(monkeypatch: pytest.MonkeyPatch, table_full: bool, *answers: Answer | Exception) -> bool | None:
    """Whether a backend is healthy for a prober after these answers."""
    remaining = iter(answers)

    async def probe(*target: object) -> Answer:
        answer = next(remaining, None)
        if answer is None:
            raise asyncio.CancelledError
        if isinstance(answer, Exception):
            raise answer
        return answer

    monkeypatch.setattr(prober, "probe", probe)
    monkeypatch.setattr(prober, "PERIOD", 0.0)
    monkeypatch.setattr(Health, "pause", lambda self: 0.0)
    probing = Prober(lambda: None, lambda: table_full)
    probing._health["a"] = Health()
    with pytest.raises(asyncio.CancelledError):
        probing._loop.run_until_complete(probing._keep_probing("a", ("198.18.0.2", 8000, "tcp")))
    probing._loop.close()
    return probing.health()["a"].healthy


@pytest.mark.parametrize("answer", [Answer(FAILED, timed_out=True), Answer(Cause.UNREACHABLE)])
@pytest.mark.parametrize(("full", "healthy"), [(True, True), (False, False)])
def test_lost_packets_are_ignored_while_the_connection_table_is_full(
    monkeypatch: pytest.MonkeyPatch, answer: Answer, full: bool, healthy: bool
) -> None:
    assert probed(monkeypatch, full, GOOD, answer, answer, answer, answer) is healthy


def test_probe_that_raises_is_followed_by_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    assert probed(monkeypatch, False, OSError("too many open files"), GOOD) is True


def test_failed_probes_are_counted_and_refusals_are_not(monkeypatch: pytest.MonkeyPatch) -> None:
    before = FAILED_PROBES.collect()[0].samples[0].value
    probed(monkeypatch, False, GOOD, Answer(FAILED), Answer(REFUSED), Answer(Cause.UNREACHABLE))
    assert FAILED_PROBES.collect()[0].samples[0].value == before + 2
