"""Asks every backend, side by side, whether it is healthy: a hung one delays none of the others.

How it asks is the fleet's health setting: `sync` (GET /sync on port 5000: 200 ready, 503 keep away), `tcp` (the
backend's port accepts a connection) or `http:/path` (GET on the backend's port answers below 400).
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import Enum

from exposition import FAILED_PROBES

log = logging.getLogger("balancer")

SYNC_PORT = 5000
FALL, RISE = 3, 2  # failed probes that end a healthy spell, good ones that begin the next
PERIOD, RETRY, TIMEOUT = 1.0, 0.1, 1.0  # seconds; RETRY while it is not yet, or no longer surely, healthy

_Target = tuple[str, int, str]  # address, port, method


class Answer(Enum):
    GOOD = "good"
    REFUSED = "asks for no new connections"  # it says so itself: no second probe needed
    FAILED = "does not answer"
    TIMED_OUT = "does not answer in time"
    UNREACHABLE = "cannot be connected to"


LOST_PACKETS = (Answer.TIMED_OUT, Answer.UNREACHABLE)  # what a full connection table can look like


class Cause(Enum):
    """Why a backend is unhealthy, as reports name it."""

    PROBE_FAILED = "probe_failed"
    UNREACHABLE = "unreachable"  # not even its kernel answers
    REFUSED = "refused"
    NO_FIRST_REPLY = "no_first_reply"  # its connections show it, not its probes


_CAUSES = {
    Answer.REFUSED: Cause.REFUSED,
    Answer.FAILED: Cause.PROBE_FAILED,
    Answer.TIMED_OUT: Cause.PROBE_FAILED,
    Answer.UNREACHABLE: Cause.UNREACHABLE,
}


@dataclass(frozen=True)
class Health:
    """`healthy` is None until a first answer. `streak` counts the probes in a row that speak against it."""

    healthy: bool | None = None
    streak: int = 0
    why: str = "not probed yet"
    cause: Cause | None = None  # where healthy is False

    def after(self, answer: Answer, why: str = "", table_full: bool = False) -> Health:
        """The health once `answer` has come in; `why` says what was asked and what came back.

        With a full connection table a probe that timed out says nothing about the backend: the kernel drops packets."""
        if table_full and answer in LOST_PACKETS:
            return self
        why = why or answer.value
        good = answer is Answer.GOOD
        cause = _CAUSES.get(answer)
        if self.healthy is None and good:
            return Health(True, 0, why)
        if good == self.healthy:
            return Health(self.healthy, 0, why, cause)
        streak = self.streak + 1
        turned = answer is Answer.REFUSED or streak >= (RISE if good else FALL)
        return Health(good, 0, why, cause) if turned else Health(self.healthy, streak, why, self.cause)

    def pause(self) -> float:
        """Seconds until the next probe."""
        return PERIOD if self.healthy and not self.streak else RETRY


async def ask(ip: str, port: int, method: str) -> tuple[Answer, str]:
    """One probe of at most TIMEOUT seconds, and its result as a text."""
    port, path = (SYNC_PORT, "/sync") if method == "sync" else (port, method.removeprefix("http:"))
    asked = f"port {port}" if method == "tcp" else f"GET {path} on port {port}"
    connected = False
    try:
        async with asyncio.timeout(TIMEOUT):
            reader, writer = await asyncio.open_connection(ip, port)
            connected = True
            if method == "tcp":
                await _close(writer)
                return Answer.GOOD, f"{asked}: open"
            status = await _get(reader, writer, f"{ip}:{port}", path)
    except TimeoutError:
        answer = Answer.TIMED_OUT if connected else Answer.UNREACHABLE
        return answer, f"{asked}: no {'answer' if connected else 'connection'} within {TIMEOUT:g} s"
    except (OSError, ValueError, IndexError) as error:
        unreachable = isinstance(error, OSError) and error.errno in (errno.EHOSTUNREACH, errno.ENETUNREACH)
        answer = Answer.UNREACHABLE if unreachable else Answer.FAILED
        return answer, f"{asked}: {error.strerror if isinstance(error, OSError) else 'no HTTP'}"
    if method == "sync":
        answer = {200: Answer.GOOD, 503: Answer.REFUSED}.get(status, Answer.FAILED)
    else:
        answer = Answer.GOOD if 200 <= status < 400 else Answer.FAILED
    return answer, f"{asked}: status {status}"


async def _get(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, host: str, path: str) -> int:
    try:
        writer.write(f"GET {path} HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n".encode())
        return int((await reader.readline()).split()[1])
    finally:
        await _close(writer)


async def _close(writer: asyncio.StreamWriter) -> None:
    writer.close()
    with contextlib.suppress(OSError):
        await writer.wait_closed()


class Prober(threading.Thread):
    """Probes the watched backends until the process ends; `changed` is called when one's health turns, `table_full`
    says whether the connection table is."""

    def __init__(self, changed: Callable[[], None], table_full: Callable[[], bool] = lambda: False) -> None:
        super().__init__(name="prober", daemon=True)
        self._changed, self._table_full = changed, table_full
        self._loop = asyncio.new_event_loop()
        self._tasks: dict[str, tuple[_Target, asyncio.Task[None]]] = {}
        self._lock = threading.Lock()  # guards _health, which this thread writes and others read
        self._health: dict[str, Health] = {}

    def run(self) -> None:
        self._loop.run_forever()

    def health(self) -> dict[str, Health]:
        """Health by id, for every watched backend."""
        with self._lock:
            return dict(self._health)

    def watch(self, backends: Mapping[str, str], port: int, method: str) -> None:
        """Watches `backends` (id → address) and nothing else."""
        wanted = {id_: (ip, port, method) for id_, ip in backends.items()}
        self._loop.call_soon_threadsafe(self._retarget, wanted)

    def _retarget(self, wanted: Mapping[str, _Target]) -> None:
        for id_ in [id_ for id_, (target, _) in self._tasks.items() if wanted.get(id_) != target]:
            self._tasks.pop(id_)[1].cancel()
            with self._lock:
                self._health.pop(id_, None)
        for id_, target in wanted.items():
            if id_ not in self._tasks:
                with self._lock:
                    self._health[id_] = Health()
                self._tasks[id_] = target, self._loop.create_task(self._keep_asking(id_, target))

    async def _keep_asking(self, id_: str, target: _Target) -> None:
        while True:
            try:
                pause = await self._ask_once(id_, target)
            except Exception:  # a task that ended would leave its backend with the last verdict for ever
                log.exception("a probe failed; trying again")
                pause = PERIOD
            await asyncio.sleep(pause)

    async def _ask_once(self, id_: str, target: _Target) -> float:
        """One probe and what follows from it; the seconds until the next one."""
        answer, why = await ask(*target)
        if answer not in (Answer.GOOD, Answer.REFUSED):  # one that refuses has answered
            FAILED_PROBES.inc()
        table_full = answer in LOST_PACKETS and self._table_full()
        with self._lock:
            before = self._health[id_]
            after = self._health[id_] = before.after(answer, why, table_full)
        if after.healthy != before.healthy:
            self._changed()
        return after.pause()
