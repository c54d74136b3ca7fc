"""The sample workload on port 8000: counts primes, and answers with the result and the backend's name.

Under too much load it refuses requests immediately, because otherwise all clients would wait too long. With
MAX_REQUESTS requests in progress, or more than MAX_CONNECTIONS connections, it answers a request immediately with 503,
`Retry-After` and `Connection: close`, so that the client returns through the balancer. `GET /ready` is answered with
200, or with 503 while a limit is reached; it does not count as a request in progress and does not wait for one.

It is a plain WSGI application: to load Flask as well would take a third of the time until a new backend serves.

After SIGTERM it serves for LINGER more seconds, because balancers send it new connections until they have removed it
from their rules. Then it closes its listener, finishes the requests in progress and exits with status 0.
"""

from __future__ import annotations

import os
import signal
import socket
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any
from urllib.parse import parse_qsl

import gevent
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

TEXT = ("Content-Type", "text/plain; charset=utf-8")
CLOSE = ("Connection", "close")
ALLOW = ("Allow", "GET, HEAD")
SATURATED = "503 Service Unavailable", "saturated: try again later\n", ("Retry-After", RETRY_AFTER)

Environ = dict[str, Any]  # the request, as WSGI describes it
StartResponse = Callable[[str, list[tuple[str, str]]], Any]  # takes the status and the headers of the answer

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


def answer(
    environ: Environ, start_response: StartResponse, status: str, text: str, *headers: tuple[str, str]
) -> list[bytes]:
    """Answers with this text and these headers."""
    body = text.encode()
    start_response(status, [*headers, TEXT, ("Content-Length", str(len(body)))])
    return [] if environ["REQUEST_METHOD"] == "HEAD" else [body]


def workload(environ: Environ, start_response: StartResponse) -> Iterable[bytes]:
    """Answers one line. `?limit=` sets the work (numbers sieved); `?seconds=` spreads the answer over that time."""
    # While draining, a client with a kept connection has to return through the balancer.
    headers = [CLOSE] if draining.is_set() else []
    if environ["PATH_INFO"] != "/":
        return answer(environ, start_response, "404 Not Found", "the only path is /\n", *headers)
    if environ["REQUEST_METHOD"] not in ("GET", "HEAD"):
        text = "the only methods are GET and HEAD\n"
        return answer(environ, start_response, "405 Method Not Allowed", text, ALLOW, *headers)
    try:
        query = dict(parse_qsl(environ["QUERY_STRING"], keep_blank_values=True))
        limit = int(query.get("limit", LIMIT_DEFAULT))
        seconds = float(query.get("seconds", 0))
    except ValueError:
        text = "limit must be a whole number, seconds a number\n"
        return answer(environ, start_response, "400 Bad Request", text, *headers)
    if not (0 <= limit <= LIMIT_MAX and 0 <= seconds <= SECONDS_MAX):
        text = f"limit must be from 0 to {LIMIT_MAX}, seconds from 0 to {SECONDS_MAX:g}\n"
        return answer(environ, start_response, "400 Bad Request", text, *headers)

    result = f"{count_primes(limit)} primes up to {limit}, for {environ['REMOTE_ADDR']}"
    line = f"{socket.gethostname()} at {own_address()}: {result}\n"
    if not seconds or environ["REQUEST_METHOD"] == "HEAD":
        return answer(environ, start_response, "200 OK", line, *headers)
    start_response("200 OK", [*headers, TEXT])
    return slowly(line, seconds)


def slowly(line: str, seconds: float) -> Iterator[bytes]:
    """Sends ten dots a second for that time, then the line."""
    for _ in range(int(seconds * 10)):
        yield b"."
        gevent.sleep(0.1)
    yield f"\n{line}".encode()


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


class Backend:
    """The WSGI application around the workload: readiness, refusals and the number of requests in progress."""

    def __init__(self, max_connections: int) -> None:
        self.in_progress = 0
        self._saturated = False
        self._turns = Turns()
        self.server = LimitedServer(("0.0.0.0", PORT), self, max_connections, IDLE_TIMEOUT)

    def __call__(self, environ: Environ, start_response: StartResponse) -> Iterable[bytes]:
        # Before the limit: a readiness check has to be answered under full load. Its connection stays open.
        if environ["PATH_INFO"] == "/ready":
            readiness = SATURATED if self.is_saturated() else ("200 OK", "ready\n")
            return answer(environ, start_response, *readiness)
        if self.in_progress >= MAX_REQUESTS:
            return answer(environ, start_response, *SATURATED, CLOSE)
        return self._work(environ, start_response)

    def _work(self, environ: Environ, start_response: StartResponse) -> Iterator[bytes]:
        self.in_progress += 1
        try:
            with self._turns.one():
                body = workload(environ, start_response)
            yield from body
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
