"""Tells the balancer on port 5000 whether this backend should get new connections.

`GET /sync` makes an HTTP request to the workload, which does not wait behind the workload's other requests: a busy
backend is not taken for a failed one. The status says what the balancer should do, see `Readiness`.
"""

from __future__ import annotations

import contextlib
import signal
from enum import Enum
from http.client import HTTPConnection, HTTPException

import gevent
import gevent.socket
from flask import Flask
from gevent import Greenlet
from gevent.event import Event

from limited_server import LimitedServer, raise_file_limit

PORT, WORKLOAD_PORT = 5000, 8000
TIMEOUT = 0.8  # seconds; the balancer's own for the whole probe is 1 s
GIVE_UP = 10.0  # seconds; after them the next check begins on a new connection
MAX_CONNECTIONS = 2000
IDLE_TIMEOUT = 5.0  # seconds; every probe has a connection of its own

app = Flask(__name__)
draining = Event()


class Client(HTTPConnection):
    """Connects by gevent's sockets: they let other greenlets run."""

    def connect(self) -> None:
        self.sock = gevent.socket.create_connection((self.host, self.port), self.timeout)


class Readiness(Enum):
    """The answer's text. 200: send connections. 503: send no new ones from now on. Others: a failed probe."""

    READY = "ready"
    STARTING = "starting"
    SATURATED = "saturated"
    DRAINING = "draining"
    NO_HTTP = "the workload answers no HTTP"
    NO_ANSWER = "the workload does not answer"


STATUS = {
    Readiness.READY: 200,
    Readiness.STARTING: 503,
    Readiness.SATURATED: 503,
    Readiness.DRAINING: 503,
    Readiness.NO_HTTP: 502,
    Readiness.NO_ANSWER: 504,
}


class Workload:
    """Asks the workload on one kept connection, which does not wait behind new ones in the listener's queue."""

    def __init__(self, port: int) -> None:
        self._client = Client("127.0.0.1", port, timeout=GIVE_UP)
        self._check: Greenlet | None = None

    def readiness(self) -> Readiness:
        """Waits at most TIMEOUT. A check that takes longer goes on, and is what the next call waits for."""
        if self._check is None or self._check.ready():
            self._check = gevent.spawn(self._ask)
        self._check.join(TIMEOUT)
        return self._check.value if self._check.ready() else Readiness.NO_ANSWER

    def _ask(self) -> Readiness:
        try:
            status = self._status_again_if_stale()
        except ConnectionRefusedError:
            return Readiness.STARTING
        except TimeoutError:
            return Readiness.NO_ANSWER
        except (OSError, HTTPException):
            return Readiness.NO_HTTP
        return {200: Readiness.READY, 503: Readiness.SATURATED}.get(status, Readiness.NO_HTTP)

    def _status_again_if_stale(self) -> int:
        """The workload closes an idle connection, which shows only when it is used: then a new one is tried."""
        if self._client.sock is not None:
            with contextlib.suppress(ConnectionError, HTTPException):
                return self._status()
        return self._status()

    def _status(self) -> int:
        """The status of one GET /ready. Raises OSError or HTTPException."""
        try:
            self._client.request("GET", "/ready")
            with self._client.getresponse() as answer:
                answer.read()
                return answer.status
        except (OSError, HTTPException):
            self._client.close()
            raise


workload = Workload(WORKLOAD_PORT)


@app.get("/sync")
def sync() -> tuple[str, int]:
    readiness = Readiness.DRAINING if draining.is_set() else workload.readiness()
    return f"{readiness.value}\n", STATUS[readiness]


def main() -> None:
    gevent.signal_handler(signal.SIGTERM, draining.set)
    raise_file_limit()
    LimitedServer(("0.0.0.0", PORT), app, MAX_CONNECTIONS, IDLE_TIMEOUT).serve_forever()


if __name__ == "__main__":
    main()
