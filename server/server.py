"""The sample workload on port 8000: counts primes, and answers with the result and the backend's name.

Under too much load it refuses requests immediately, because otherwise all clients would wait too long. With
MAX_REQUESTS requests in progress, or more than MAX_CONNECTIONS connections, it answers a request immediately with 503,
`Retry-After` and `Connection: close`, so that the client returns through the balancer. `GET /ready` is answered with
200, or with 503 while a limit is reached; it does not count as a request in progress and does not wait for one.

After SIGTERM it serves for LINGER more seconds, because balancers send it new connections until they have removed it
from their rules. Then it closes its listener, finishes the requests in progress and exits with status 0.
"""

from __future__ import annotations

import os
import signal
import socket
import time
from collections.abc import Iterable, Iterator
from contextlib import closing, contextmanager
from functools import cache
from typing import Any

import gevent
from flask import Flask, Response, request
from gevent.event import Event
from gevent.lock import Semaphore

from limited_server import RETRY_AFTER, LimitedServer, raise_file_limit

PORT = 8000
LIMIT_DEFAULT, LIMIT_MAX = 2_000, 1_000_000  # numbers sieved
SECONDS_MAX = 60.0
LINGER = float(os.environ.get("LINGER", "1"))  # seconds
FINISH = 60.0  # seconds for the requests in progress
MAX_REQUESTS = int(os.environ.get("MAX_REQUESTS", "512"))  # in progress: received and not completely answered
MAX_CONNECTIONS = int(os.environ.get("MAX_CONNECTIONS", "8000"))  # fewer where the limit of open files is lower
IDLE_TIMEOUT = 120.0  # seconds between two requests on one connection
READY_AGAIN = 0.8  # a saturated backend is ready again below this share of both limits
COMPUTE_SLICE = 0.01  # seconds of computing, at least, before the event loop runs again

app = Flask(__name__)
draining = Event()


def count_primes(limit: int) -> int:
    """How many primes there are up to and including `limit` (sieve of Eratosthenes)."""
    if limit < 2:
        return 0
    # One byte per number, 1 for those that are not crossed out.
    sieve = bytearray([1]) * (limit + 1)
    sieve[0:2] = b"\0\0"
    for n in range(2, int(limit**0.5) + 1):
        if sieve[n]:
            sieve[n * n :: n] = bytes(len(range(n * n, limit + 1, n)))
    return sum(sieve)


# Cached, because a lookup blocks all other requests.
@cache
def own_address() -> str:
    """The address of this container's name, or a text that there is none."""
    try:
        return socket.gethostbyname(socket.gethostname())
    except OSError:
        return "no address"


@app.get("/")
def index() -> Response | tuple[str, int]:
    """Answers one line. `?limit=` sets the work (numbers sieved); `?seconds=` spreads the answer over that time."""
    try:
        limit = int(request.args.get("limit", LIMIT_DEFAULT))
        seconds = float(request.args.get("seconds", 0))
    except ValueError:
        return "limit must be a whole number, seconds a number\n", 400
    if not (0 <= limit <= LIMIT_MAX and 0 <= seconds <= SECONDS_MAX):
        return f"limit must be from 0 to {LIMIT_MAX}, seconds from 0 to {SECONDS_MAX:g}\n", 400
    line = (
        f"{socket.gethostname()} at {own_address()}: {count_primes(limit)} primes up to {limit}, "
        f"for {request.remote_addr}\n"
    )
    return Response(slowly(line, seconds) if seconds else line, mimetype="text/plain")


def slowly(line: str, seconds: float) -> Iterator[str]:
    """Sends ten dots a second for that time, then the line."""
    for _ in range(int(seconds * 10)):
        yield "."
        gevent.sleep(0.1)
    yield "\n" + line


@app.after_request
def close_while_draining(response: Response) -> Response:
    """Makes a client with a kept connection return through the balancer."""
    if draining.is_set():
        response.headers["Connection"] = "close"
    return response


class Turns:
    """Lets one request compute at a time, and lets the event loop read and answer others in between.

    Computing and the event loop share one thread. The loop gets one pass after each slice of computing, so that
    readiness checks are answered. A slice lasts at least as long as that pass did, so that many refusals do not use up
    the time of the other requests.
    """

    def __init__(self) -> None:
        self._turn = Semaphore()
        self._slice_ends = 0.0  # time.monotonic()

    @contextmanager
    def one(self) -> Iterator[None]:
        with self._turn:
            # Within a slice, requests compute one after the other without a pass of the event loop.
            if time.monotonic() >= self._slice_ends:
                self._run_event_loop()
            yield

    def _run_event_loop(self) -> None:
        began = time.monotonic()
        gevent.idle(priority=2)  # the highest priority: waits for one pass only, even if more events are pending
        resumed = time.monotonic()
        self._slice_ends = resumed + max(COMPUTE_SLICE, resumed - began)


def saturated(**headers: str) -> Response:
    headers = {"Retry-After": RETRY_AFTER, **headers}
    return Response("saturated: try again later\n", 503, headers, mimetype="text/plain")


READY = Response("ready\n", mimetype="text/plain")
NOT_READY = saturated()  # the synchronization server keeps its connection
REFUSED = saturated(Connection="close")


class Backend:
    """The WSGI application around the workload: readiness, refusals and the number of requests in progress."""

    def __init__(self, max_connections: int) -> None:
        self.in_progress = 0
        self._saturated = False
        self._turns = Turns()
        self.server = LimitedServer(("0.0.0.0", PORT), self, max_connections, IDLE_TIMEOUT)

    def __call__(self, environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
        # Before the limit: a readiness check has to be answered under full load.
        if environ["PATH_INFO"] == "/ready":
            readiness = NOT_READY if self.is_saturated() else READY
            return readiness(environ, start_response)
        if self.in_progress >= MAX_REQUESTS:
            return REFUSED(environ, start_response)
        return self._work(environ, start_response)

    def _work(self, environ: dict[str, Any], start_response: Any) -> Iterator[bytes]:
        self.in_progress += 1
        try:
            with self._turns.one():
                answer: Any = app(environ, start_response)
            with closing(answer):
                yield from answer
        finally:
            self.in_progress -= 1

    def is_saturated(self) -> bool:
        """True from the time that a limit is reached until both numbers are below READY_AGAIN of their limits."""
        # Two thresholds, so that readiness does not change with every request.
        share = READY_AGAIN if self._saturated else 1.0
        too_many_requests = self.in_progress >= share * MAX_REQUESTS
        too_many_connections = self.server.connections >= share * self.server.max_connections
        self._saturated = too_many_requests or too_many_connections
        return self._saturated


def finish(server: LimitedServer) -> None:
    """Closes the listener after LINGER and waits for the requests in progress, for FINISH at most."""
    gevent.sleep(LINGER)
    server.close()
    deadline = time.monotonic() + FINISH
    while server.busy and time.monotonic() < deadline:
        gevent.sleep(0.02)


def main() -> None:
    gevent.signal_handler(signal.SIGTERM, draining.set)
    server = Backend(min(MAX_CONNECTIONS, raise_file_limit())).server
    server.start()
    draining.wait()
    finish(server)


if __name__ == "__main__":
    main()
