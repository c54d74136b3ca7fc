"""The sample workload on port 8000: counts primes and says which backend did it.

It ends well: on SIGTERM it goes on answering for LINGER seconds, because balancers still deal it new connections until
the news reaches them; then it closes its door, finishes the requests in hand and exits with status 0.
"""

from __future__ import annotations

import logging
import os
import signal
import socket
import threading
import time
from collections.abc import Iterator

from flask import Flask, Response, request
from waitress.channel import HTTPChannel
from waitress.server import TcpWSGIServer, create_server
from waitress.task import WSGITask

PORT = 8000
LIMIT_DEFAULT, LIMIT_MAX = 2_000, 1_000_000  # numbers sieved
SECONDS_MAX = 60.0
LINGER = float(os.environ.get("LINGER", "1"))  # seconds
FINISH = 60.0  # seconds for the requests in hand

app = Flask(__name__)
draining = threading.Event()


def count_primes(limit: int) -> int:
    """How many primes there are up to and including `limit` (sieve of Eratosthenes)."""
    if limit < 2:
        return 0
    sieve = bytearray([1]) * (limit + 1)
    sieve[0:2] = b"\0\0"
    for n in range(2, int(limit**0.5) + 1):
        if sieve[n]:
            sieve[n * n :: n] = bytes(len(range(n * n, limit + 1, n)))
    return sum(sieve)


def own_address() -> str:
    try:
        return socket.gethostbyname(socket.gethostname())
    except OSError:
        return "no address"


@app.get("/")
def index() -> Response | tuple[str, int]:
    """One line. `?limit=` sets the work (numbers sieved); `?seconds=` spreads the answer over that time."""
    try:
        limit = int(request.args.get("limit", LIMIT_DEFAULT))
        seconds = float(request.args.get("seconds", 0))
    except ValueError:
        return "limit takes a whole number, seconds a number\n", 400
    if not (0 <= limit <= LIMIT_MAX and 0 <= seconds <= SECONDS_MAX):
        return f"limit goes from 0 to {LIMIT_MAX}, seconds from 0 to {SECONDS_MAX:g}\n", 400
    line = (
        f"{socket.gethostname()} at {own_address()}: {count_primes(limit)} primes up to {limit}, "
        f"for {request.remote_addr}\n"
    )
    return Response(slowly(line, seconds) if seconds else line, mimetype="text/plain")


def slowly(line: str, seconds: float) -> Iterator[str]:
    for _ in range(int(seconds * 10)):
        yield "."
        time.sleep(0.1)
    yield "\n" + line


class LettingGo(WSGITask):
    """Answers `Connection: close` while draining, so that a kept-alive client comes back through the balancer.

    The application may not set that header itself (PEP 3333), hence here.
    """

    def build_response_header(self) -> bytes:
        if draining.is_set():
            self.request.headers["CONNECTION"] = "close"
        header: bytes = super().build_response_header()
        return header


def finish(server: TcpWSGIServer) -> None:
    """Closes the door after LINGER, waits for the requests in hand (FINISH at most) and ends the process."""
    time.sleep(LINGER)
    server.accepting = False
    server.socket.shutdown(socket.SHUT_RDWR)
    deadline = time.monotonic() + FINISH
    while time.monotonic() < deadline and any(
        channel.requests or channel.total_outbufs_len for channel in list(server.active_channels.values())
    ):
        time.sleep(0.02)
    os._exit(0)


def main() -> None:
    HTTPChannel.task_class = LettingGo
    logging.getLogger("waitress.queue").setLevel(logging.ERROR)
    server = create_server(app, host="0.0.0.0", port=PORT, threads=8, ident=None)

    def on_term(_signal: int, _frame: object) -> None:
        if not draining.is_set():
            draining.set()
            threading.Thread(target=finish, args=(server,), daemon=True).start()

    signal.signal(signal.SIGTERM, on_term)
    server.run()


if __name__ == "__main__":
    main()
