"""The balancer's own HTTP interface on port 5000: for the health check, Prometheus and people.

gevent serves it, in a thread with an event loop of its own. A request has to come in within REQUEST_SECONDS, and
MAX_CONNECTIONS are open at once, so that silent or slow clients keep nobody else from being served.
"""

from __future__ import annotations

import json
import resource
import threading
from typing import Any, Protocol

import gevent
from flask import Flask, Response
from gevent.pool import Pool
from gevent.pywsgi import WSGIHandler, WSGIServer

from exposition import Gauges, exposition

PORT = 5000
REQUEST_SECONDS = 5.0
MAX_CONNECTIONS = 4000
RESERVED_FILES = 500  # for the client's own sockets and pipes: a probe of each backend, the tools it runs
BACKLOG = 1024


class Source(Protocol):
    """What is served."""

    def state(self) -> tuple[dict[str, Any], int]: ...

    def gauges(self) -> Gauges: ...


def create_app(source: Source) -> Flask:
    app = Flask(__name__)

    @app.get("/sync")
    def sync() -> Response:
        message, status = source.state()
        return Response(json.dumps(message) + "\n", status, mimetype="application/json")

    @app.get("/metrics")
    def metrics() -> Response:
        return Response(exposition(source.gauges()), mimetype="text/plain; version=0.0.4")

    return app


class _Handler(WSGIHandler):  # type: ignore[misc]  # gevent has no types
    def handle_one_request(self) -> Any:
        """Reads and answers one request; a client that takes too long is disconnected."""
        with gevent.Timeout(REQUEST_SECONDS, False):
            return super().handle_one_request()
        return None


def connection_limit() -> int:
    """How many connections may be open at once, so that they never take the files that the rest of the client needs.
    Raises the process's limit of open files as far as that is allowed and of use."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = MAX_CONNECTIONS + RESERVED_FILES
    if soft < wanted:
        soft = min(wanted, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    return max(1, min(MAX_CONNECTIONS, soft - RESERVED_FILES))


def make_server(app: Flask, port: int = PORT) -> WSGIServer:
    return WSGIServer(
        ("0.0.0.0", port),
        app,
        log=None,
        error_log=None,
        handler_class=_Handler,
        spawn=Pool(connection_limit()),
        backlog=BACKLOG,
    )


def serve_in_thread(app: Flask, port: int = PORT) -> threading.Thread:
    """Serves until the process ends."""

    def serve() -> None:
        make_server(app, port).serve_forever()  # made here: the event loop belongs to this thread

    thread = threading.Thread(target=serve, name="http", daemon=True)
    thread.start()
    return thread
