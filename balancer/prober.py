"""Probes every backend concurrently: a backend that hangs delays none of the others.

The snapshot's health setting is the method. A backend is healthy
- with `sync`, if GET /sync on port 5000 has the status 200; with 503 it refuses new connections,
- with `tcp`, if its port accepts a connection,
- with `http:/path`, if GET on its port has a status from 200 to 399.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import re
import threading
from collections.abc import Callable, Mapping

from exposition import FAILED_PROBES
from health import PERIOD, Answer, Cause, Health
from snapshot import Snapshot

log = logging.getLogger("balancer")

SYNC_PORT = 5000
TIMEOUT = 1.0  # seconds for a whole probe
STATUS = re.compile(rb"[1-9][0-9]{2}")

_Target = tuple[str, int, str]  # address, port, method


async def probe(ip: str, port: int, method: str) -> Answer:
    """Makes one probe of at most TIMEOUT seconds."""
    # Only the sample server is probed on a port of its own.
    port, path = (SYNC_PORT, "/sync") if method == "sync" else (port, method.removeprefix("http:"))
    request = f"port {port}" if method == "tcp" else f"GET {path} on port {port}"
    connected = False
    try:
        async with asyncio.timeout(TIMEOUT):
            reader, writer = await asyncio.open_connection(ip, port)
            connected = True
            with contextlib.closing(writer):
                if method == "tcp":
                    return Answer(None, f"{request}: open")
                writer.write(f"GET {path} HTTP/1.1\r\nHost: {ip}:{port}\r\nConnection: close\r\n\r\n".encode())
                line = await reader.readline()
    except TimeoutError:
        # A connection without an answer is a failure of the program; without a connection the host may be unreachable.
        if connected:
            return Answer(Cause.PROBE_FAILED, f"{request}: no answer within {TIMEOUT:g} s", timed_out=True)
        return Answer(Cause.UNREACHABLE, f"{request}: no connection within {TIMEOUT:g} s")
    except OSError as error:
        unreachable = error.errno in (errno.EHOSTUNREACH, errno.ENETUNREACH)
        return Answer(Cause.UNREACHABLE if unreachable else Cause.PROBE_FAILED, f"{request}: {error.strerror or error}")
    except ValueError:  # the line is longer than asyncio's limit
        line = b""
    return answer_to(line, method, request)


def answer_to(line: bytes, method: str, request: str) -> Answer:
    """The result of a probe whose answer begins with this line. `request` is for people. Nothing of the line but its
    status is part of the result, because the manager refuses a report with a text that is too long."""
    words = line.split(maxsplit=2)
    if len(words) < 2 or not STATUS.fullmatch(words[1]):
        return Answer(Cause.PROBE_FAILED, f"{request}: no HTTP")
    status = int(words[1])
    return Answer(_cause(status, method), f"{request}: status {status}")


def _cause(status: int, method: str) -> Cause | None:
    """The cause that the status of an HTTP answer stands for; None for a healthy backend."""
    if method == "sync":
        return {200: None, 503: Cause.REFUSED}.get(status, Cause.PROBE_FAILED)
    return None if 200 <= status < 400 else Cause.PROBE_FAILED


class Prober(threading.Thread):
    """Probes the watched backends until the process ends. Calls `changed` when a backend's health changes. `table_full`
    returns whether the connection table is full."""

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

    def watch(self, snapshot: Snapshot) -> None:
        """Watches the backends of the snapshot and no others."""
        targets = {backend.id: (backend.ip, snapshot.port, snapshot.health) for backend in snapshot.backends}
        # Tasks may be changed in the thread of their event loop only.
        self._loop.call_soon_threadsafe(self._retarget, targets)

    def _retarget(self, targets: Mapping[str, _Target]) -> None:
        # End the probes of backends that were removed, or whose address, port or method changed.
        for id_, (target, task) in list(self._tasks.items()):
            if targets.get(id_) != target:
                task.cancel()
                del self._tasks[id_]
                with self._lock:
                    del self._health[id_]
        # Start those of new backends.
        for id_ in targets.keys() - self._tasks.keys():
            with self._lock:
                self._health[id_] = Health()
            self._tasks[id_] = targets[id_], self._loop.create_task(self._keep_probing(id_, targets[id_]))

    async def _keep_probing(self, id_: str, target: _Target) -> None:
        while True:
            try:
                pause = await self._probe_once(id_, target)
            except Exception:  # if this task ended, its backend would keep its last health for ever
                log.exception("a probe failed; trying again")
                pause = PERIOD
            await asyncio.sleep(pause)

    async def _probe_once(self, id_: str, target: _Target) -> float:
        """Makes one probe and returns the seconds until the next."""
        answer = await probe(*target)
        if answer.cause not in (None, Cause.REFUSED):  # a refusal is an answer
            FAILED_PROBES.inc()
        table_full = answer.may_be_lost and self._table_full()
        with self._lock:
            before = self._health[id_]
            after = self._health[id_] = before.after(answer, table_full)
        if after.healthy != before.healthy:
            self._changed()
        return after.pause()
