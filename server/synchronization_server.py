"""Tells the balancer on port 5000 whether this backend should get new connections.

`GET /sync` answers 200 `ready` while the workload accepts connections, 503 `draining` from SIGTERM on, and 503
`starting` while nothing listens on the workload's port. It looks no deeper than a TCP connection on purpose: a busy
backend must not be taken for a dead one.
"""

from __future__ import annotations

import signal
import socket
import threading

import waitress
from flask import Flask

PORT, WORKLOAD_PORT = 5000, 8000

app = Flask(__name__)
draining = threading.Event()


def workload_accepts(port: int = WORKLOAD_PORT) -> bool:
    try:
        with socket.create_connection(("127.0.0.1", port), timeout=0.5):
            return True
    except OSError:
        return False


@app.get("/sync")
def sync() -> tuple[str, int]:
    if draining.is_set():
        return "draining\n", 503
    return ("ready\n", 200) if workload_accepts() else ("starting\n", 503)


def main() -> None:
    signal.signal(signal.SIGTERM, lambda _signal, _frame: draining.set())
    waitress.serve(app, host="0.0.0.0", port=PORT, threads=2, ident=None, _quiet=True)


if __name__ == "__main__":
    main()
