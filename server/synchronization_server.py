"""Reports on port 5000 whether this backend should get new connections. The balancer probes it.

`GET /sync` makes an HTTP request to the workload. That request does not wait behind the workload's other requests, so a
busy backend is not mistaken for a failed one. The status of the answer is the report, see `Readiness`.
"""

from __future__ import annotations

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
TIMEOUT = 0.8  # seconds; the balancer's timeout for the whole probe is 1 s
CHECK_TIMEOUT = 10.0  # seconds until a check is given up; the next one uses a new connection
MAX_CONNECTIONS = 2000
IDLE_TIMEOUT = 5.0  # seconds; each probe has its own connection

app = Flask(__name__)
draining = Event()


class Readiness(Enum):
    """The answer's status and text. 200: send connections. 503: send no new ones. Others: a failed probe."""

    READY = 200, "ready"
    STARTING = 503, "starting"
    SATURATED = 503, "saturated"
    DRAINING = 503, "draining"
    NO_HTTP = 502, "the workload answers no HTTP"
    NO_ANSWER = 504, "the workload does not answer"


WORKLOAD_STATUS = {200: Readiness.READY, 503: Readiness.SATURATED}


class Client(HTTPConnection):
    """Connects with gevent's sockets, which let other greenlets run."""

    def connect(self) -> None:
        self.sock = gevent.socket.create_connection((self.host, self.port), self.timeout)


class Workload:
    """Checks the workload over one connection that stays open: a new one would wait in the queue of the listener."""

    def __init__(self, port: int) -> None:
        self._client = Client("127.0.0.1", port, timeout=CHECK_TIMEOUT)
        self._check: Greenlet | None = None

    def readiness(self) -> Readiness:
        """Waits for TIMEOUT at most. A check that takes longer continues, and the next call waits for its result."""
        # One check at a time: probes during a slow check wait for the same result.
        if self._check is None or self._check.ready():
            self._check = gevent.spawn(self._request)
        self._check.join(TIMEOUT)
        return self._check.value if self._check.ready() else Readiness.NO_ANSWER

    def _request(self) -> Readiness:
        kept = self._client.sock is not None
        try:
            return WORKLOAD_STATUS.get(self._status(), Readiness.NO_HTTP)
        except ConnectionRefusedError:
            return Readiness.STARTING
        except TimeoutError:
            return Readiness.NO_ANSWER
        except (OSError, HTTPException):
            # The workload may have closed a kept connection as idle. That shows only when the connection is used.
            return self._request() if kept else Readiness.NO_HTTP

    def _status(self) -> int:
        """The status of one GET /ready. After an error, the next request uses a new connection."""
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
    status, text = readiness.value
    return f"{text}\n", status


def main() -> None:
    gevent.signal_handler(signal.SIGTERM, draining.set)
    raise_file_limit()
    LimitedServer(("0.0.0.0", PORT), app, MAX_CONNECTIONS, IDLE_TIMEOUT).serve_forever()


if __name__ == "__main__":
    main()
