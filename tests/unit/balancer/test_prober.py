"""Probes: what an answer means, what makes a backend healthy or ill, and that nobody waits for the slow."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import threading
import time
from collections.abc import Callable, Iterator

import pytest

import prober
from prober import Answer, Cause, Health, Prober

G, R, F, T = Answer.GOOD, Answer.REFUSED, Answer.FAILED, Answer.TIMED_OUT


@pytest.mark.parametrize(
    ("answers", "healthy"),
    [
        ([], None),
        ([F, F], None),
        ([F, F, G, F, F], True),
        ([F, F, F], False),
        ([F, F, F, G], False),
        ([F, F, F, G, G], True),
        ([R], False),
        ([F, R], False),
        ([G, F], True),
        ([G, F, F], True),
        ([G, F, F, F], False),
        ([G, F, F, G, F, F], True),
        ([G, R], False),
        ([G, F, R], False),
        ([G, R, G], False),
        ([G, R, G, G], True),
        ([G, R, G, F, G], False),
        ([G, R, G, R, G, G], True),
        ([G, F, F, F, G, G, F, F], True),
    ],
)
def test_a_backend_turns_ill_after_three_failures_or_one_refusal_and_well_after_two_good_answers(
    answers: list[Answer], healthy: bool | None
) -> None:
    health = Health()
    for answer in answers:
        health = health.after(answer)
    assert health.healthy is healthy
    assert health.why == (answers[-1].value if answers else "not probed yet")


@pytest.mark.parametrize(
    ("answers", "pause"), [([], 0.1), ([F], 0.1), ([G], 1.0), ([G, F], 0.1), ([G, F, G], 1.0), ([G, R], 0.1)]
)
def test_it_asks_again_soon_while_in_doubt_and_every_second_while_well(answers: list[Answer], pause: float) -> None:
    health = Health()
    for answer in answers:
        health = health.after(answer)
    assert health.pause() == pause


@pytest.mark.parametrize(
    ("answers", "cause"),
    [
        ([G], None),
        ([G, F], None),
        ([F, F, F], Cause.PROBE_FAILED),
        ([G, T, T, T], Cause.PROBE_FAILED),
        ([G, R], Cause.REFUSED),
        ([R, F], Cause.PROBE_FAILED),
        ([F, F, F, R], Cause.REFUSED),
        ([R, G], Cause.REFUSED),
        ([R, G, G], None),
    ],
)
def test_an_unhealthy_backend_has_a_cause(answers: list[Answer], cause: Cause | None) -> None:
    health = Health()
    for answer in answers:
        health = health.after(answer)
    assert health.cause == cause


@pytest.mark.parametrize(
    ("answers", "healthy"),
    [([G, T, T, T, T], True), ([T, T, T], None), ([G, F, F, F], False), ([G, R], False), ([R, T, T, G, G], True)],
)
def test_with_a_full_connection_table_a_probe_that_times_out_changes_nothing(
    answers: list[Answer], healthy: bool | None
) -> None:
    health = Health()
    for answer in answers:
        health = health.after(answer, table_full=True)
    assert health.healthy is healthy


class Door:
    """Listens on any loopback address; answers every request with `reply`, or with nothing at all."""

    def __init__(self, reply: bytes | None, ip: str = "127.0.0.1", port: int = 0) -> None:
        self.reply, self.requests = reply, 0
        self.first_line = b""
        self._door = socket.create_server((ip, port))
        self.port = self._door.getsockname()[1]
        self._held: list[socket.socket] = []
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def _serve(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                visitor, _ = self._door.accept()
                self.requests += 1
                if self.reply is None:
                    self._held.append(visitor)
                    continue
                with visitor, contextlib.suppress(OSError):
                    self.first_line = visitor.recv(1000).split(b"\r\n")[0]
                    visitor.sendall(self.reply)

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._door.shutdown(socket.SHUT_RDWR)
        self._door.close()
        self._thread.join(2)
        for visitor in self._held:
            visitor.close()


@pytest.fixture
def door() -> Iterator[Callable[..., Door]]:
    opened: list[Door] = []

    def build(reply: bytes | None, ip: str = "127.0.0.1", port: int = 0) -> Door:
        opened.append(Door(reply, ip, port))
        return opened[-1]

    yield build
    for one in opened:
        one.close()


@pytest.fixture
def closed_port() -> Iterator[int]:
    """A port on which nobody listens, and that nobody else can take meanwhile."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        yield taken.getsockname()[1]


def http(status: str) -> bytes:
    return f"HTTP/1.1 {status}\r\nContent-Length: 3\r\nLocation: /elsewhere\r\n\r\nhi\n".encode()


@pytest.mark.parametrize(
    ("method", "reply", "answer", "asked"),
    [
        ("sync", http("200 OK"), G, b"GET /sync HTTP/1.1"),
        ("sync", http("503 Service Unavailable"), R, b"GET /sync HTTP/1.1"),
        ("sync", http("404 Not Found"), F, b"GET /sync HTTP/1.1"),
        ("sync", None, T, b""),
        ("sync", b"", F, b"GET /sync HTTP/1.1"),
        ("sync", b"SSH-2.0-OpenSSH_9.2\r\n", F, b"GET /sync HTTP/1.1"),
        ("sync", b"HTTP/1.1 fine\r\n", F, b"GET /sync HTTP/1.1"),
        ("sync", b"x" * 100_000, F, b"GET /sync HTTP/1.1"),
        ("tcp", http("503 Service Unavailable"), G, b""),
        ("tcp", None, G, b""),
        ("http:/health?deep=1", http("200 OK"), G, b"GET /health?deep=1 HTTP/1.1"),
        ("http:/health", http("302 Found"), G, b"GET /health HTTP/1.1"),
        ("http:/health", http("404 Not Found"), F, b"GET /health HTTP/1.1"),
        ("http:/health", http("503 Service Unavailable"), F, b"GET /health HTTP/1.1"),
        ("http:/health", http("100 Continue"), F, b"GET /health HTTP/1.1"),
        ("http:/health", None, T, b""),
    ],
)
def test_an_answer_is_judged_by_the_health_setting(
    monkeypatch: pytest.MonkeyPatch,
    door: Callable[..., Door],
    closed_port: int,
    method: str,
    reply: bytes | None,
    answer: Answer,
    asked: bytes,
) -> None:
    backend = door(reply)
    port, sync_port = (closed_port, backend.port) if method == "sync" else (backend.port, closed_port)
    monkeypatch.setattr(prober, "SYNC_PORT", sync_port)
    monkeypatch.setattr(prober, "TIMEOUT", 0.15)
    began = time.monotonic()
    assert asyncio.run(prober.ask("127.0.0.1", port, method))[0] is answer
    assert time.monotonic() - began < 2
    assert backend.first_line == asked


@pytest.mark.parametrize("method", ["sync", "tcp", "http:/health"])
def test_a_port_nobody_listens_on_is_a_failure(
    monkeypatch: pytest.MonkeyPatch, door: Callable[..., Door], closed_port: int, method: str
) -> None:
    other = door(http("200 OK")).port
    port, sync_port = (other, closed_port) if method == "sync" else (closed_port, other)
    monkeypatch.setattr(prober, "SYNC_PORT", sync_port)
    assert asyncio.run(prober.ask("127.0.0.1", port, method))[0] is F


class Watch:
    """A running Prober whose period is short, and the number of times it said that a health turned."""

    def __init__(self) -> None:
        self.turns = 0
        self.prober = Prober(self._turned)
        self.prober.start()

    def _turned(self) -> None:
        self.turns += 1

    def healthy(self, id_: str) -> bool | None:
        return self.prober.health().get(id_, Health()).healthy

    def close(self) -> None:
        loop = self.prober._loop
        self.prober.watch({}, 0, "tcp")
        loop.call_soon_threadsafe(loop.stop)
        self.prober.join(2)
        loop.run_until_complete(asyncio.sleep(0.01))  # lets the cancelled probes end
        loop.close()


@pytest.fixture
def watch(monkeypatch: pytest.MonkeyPatch) -> Iterator[Watch]:
    monkeypatch.setattr(prober, "PERIOD", 0.01)
    monkeypatch.setattr(prober, "RETRY", 0.005)
    watch = Watch()
    yield watch
    watch.close()


def until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 5
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_a_hung_backend_delays_no_other(
    monkeypatch: pytest.MonkeyPatch, door: Callable[..., Door], watch: Watch
) -> None:
    good = door(http("200 OK"))
    monkeypatch.setattr(prober, "SYNC_PORT", good.port)
    monkeypatch.setattr(prober, "TIMEOUT", 60.0)
    hung = [door(None, f"127.0.0.{number}", good.port) for number in range(2, 12)]
    watch.prober.watch({**{f"hung{i}": f"127.0.0.{i + 2}" for i in range(10)}, "good": "127.0.0.1"}, 0, "sync")
    until(lambda: good.requests >= 5 and all(one.requests for one in hung))
    assert watch.healthy("good") is True
    assert [one.requests for one in hung] == [1] * 10  # each still in its first probe
    assert watch.healthy("hung0") is None


def test_a_turn_of_health_is_told_once_in_each_direction(
    monkeypatch: pytest.MonkeyPatch, door: Callable[..., Door], watch: Watch
) -> None:
    backend = door(http("200 OK"))
    watch.prober.watch({"a": "127.0.0.1"}, backend.port, "http:/")
    until(lambda: backend.requests >= 4)
    assert (watch.healthy("a"), watch.turns) == (True, 1)
    backend.reply = http("500 Oops")
    until(lambda: watch.healthy("a") is False)
    seen = backend.requests
    until(lambda: backend.requests >= seen + 3)
    assert watch.turns == 2


def test_a_new_id_on_an_old_address_starts_afresh_and_the_old_one_is_dropped(
    door: Callable[..., Door], watch: Watch
) -> None:
    backend = door(http("200 OK"))
    watch.prober.watch({"old": "127.0.0.1"}, backend.port, "http:/")
    until(lambda: watch.healthy("old"))
    backend.reply = None
    watch.prober.watch({"new": "127.0.0.1"}, backend.port, "http:/")
    until(lambda: "new" in watch.prober.health())
    assert watch.prober.health() == {"new": Health()}


def test_a_backend_still_watched_keeps_its_health_and_a_changed_setting_asks_anew(
    door: Callable[..., Door], watch: Watch
) -> None:
    backend, other = door(http("200 OK")), door(None)
    watch.prober.watch({"a": "127.0.0.1"}, backend.port, "http:/")
    until(lambda: watch.healthy("a"))
    turns = watch.turns
    watch.prober.watch({"a": "127.0.0.1", "b": "127.0.0.1"}, backend.port, "http:/")
    until(lambda: watch.healthy("b") and watch.turns > turns)
    assert (watch.healthy("a"), watch.turns) == (True, turns + 1)
    watch.prober.watch({"a": "127.0.0.1"}, other.port, "http:/")
    until(lambda: other.requests)
    seen = backend.requests
    time.sleep(0.1)
    assert backend.requests <= seen + 1  # a probe may have been on its way; there is no other
    assert watch.healthy("a") is None


def probed(monkeypatch: pytest.MonkeyPatch, full: bool, *answers: Answer | Exception) -> bool | None:
    """Whether a prober finds a backend healthy after these answers; `full`: the connection table is."""
    remaining = iter(answers)

    async def ask(*target: object) -> tuple[Answer, str]:
        answer = next(remaining, None)
        if answer is None:
            raise asyncio.CancelledError
        if isinstance(answer, Exception):
            raise answer
        return answer, ""

    monkeypatch.setattr(prober, "ask", ask)
    monkeypatch.setattr(prober, "PERIOD", 0.0)
    monkeypatch.setattr(prober, "RETRY", 0.0)
    probing = Prober(lambda: None, lambda: full)
    probing._health["a"] = Health()
    with pytest.raises(asyncio.CancelledError):
        probing._loop.run_until_complete(probing._keep_asking("a", ("198.18.0.2", 8000, "tcp")))
    probing._loop.close()
    return probing.health()["a"].healthy


@pytest.mark.parametrize("answer", [Answer.TIMED_OUT, Answer.UNREACHABLE])
@pytest.mark.parametrize(("full", "healthy"), [(True, True), (False, False)])
def test_the_prober_asks_whether_the_connection_table_is_full(
    monkeypatch: pytest.MonkeyPatch, answer: Answer, full: bool, healthy: bool
) -> None:
    assert probed(monkeypatch, full, G, answer, answer, answer, answer) is healthy


def test_probe_that_fails_itself_is_followed_by_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    assert probed(monkeypatch, False, OSError("too many open files"), G) is True
