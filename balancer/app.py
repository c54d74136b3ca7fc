"""The balancer's own HTTP interface: for Docker's health check, Prometheus and people.

gevent serves it, in a thread with its own event loop. Silent, slow or very fast clients do not block others: a request
must arrive and be answered within REQUEST_SECONDS, and up to MAX_CONNECTIONS connections may be open at a time. A
request with more than HEADERS_MAX bytes of headers is refused, because pywsgi would keep 6 MB of them in memory for
each connection. Errors of clients are not logged, because clients could fill the log.
"""

from __future__ import annotations

import io
import resource
import socket
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import gevent
from flask import Flask, Response
from gevent.pool import Pool
from gevent.pywsgi import WSGIHandler, WSGIServer

REQUEST_SECONDS = 5.0
HEADERS_MAX = 16384
READ_BUFFER = 1024  # bytes
MAX_CONNECTIONS = 4000
RESERVED_FILES = 500  # for the process's own sockets and pipes: a probe of each backend, the tools it runs
BACKLOG = 1024


def create_app(sync: Callable[[], tuple[dict[str, Any], int]], metrics: Callable[[], bytes]) -> Flask:
    """`sync` returns the message of GET /sync and its status, `metrics` the text of GET /metrics."""
    app = Flask(__name__)
    app.add_url_rule("/sync", "sync", sync)
    app.add_url_rule("/metrics", "metrics", lambda: Response(metrics(), mimetype="text/plain; version=0.0.4"))
    return app


class _FromClient(socket.SocketIO):
    """The bytes from a client. Each read lets other greenlets run first, even if the client sends without pause."""

    def readinto(self, buffer: Any) -> int | None:
        gevent.sleep(0)
        return super().readinto(buffer)


class _Handler(WSGIHandler):  # type: ignore[misc]  # gevent has no types
    def __init__(self, sock: Any, address: Any, server: WSGIServer) -> None:
        super().__init__(sock, address, server, rfile=io.BufferedReader(_FromClient(sock, "rb"), READ_BUFFER))

    def handle(self) -> None:
        with suppress(OSError):  # the client has disconnected
            super().handle()

    def handle_one_request(self) -> Any:
        """Reads and answers one request; disconnects a client that takes too long."""
        # The timeout ends the block without an exception. None then makes pywsgi close the connection.
        with gevent.Timeout(REQUEST_SECONDS, False):
            return super().handle_one_request()
        return None

    def MessageClass(self, source: Any, *_: Any) -> Any:  # noqa: N802 - pywsgi's name
        """Reads the headers."""
        block, line = bytearray(), b"-"
        while line.strip(b"\r\n"):
            line = source.readline(HEADERS_MAX + 1 - len(block))
            block += line
            if len(block) > HEADERS_MAX:
                raise ValueError("the headers are too long")  # pywsgi answers with 400
        return super().MessageClass(io.BytesIO(block))

    def _handle_client_error(self, ex: Exception) -> Any:
        """The answer to a malformed header. pywsgi would print a traceback for some."""
        return super()._handle_client_error(ValueError(str(ex)))

    def handle_error(self, *_: Any) -> None:
        """Disconnects a client that sent a malformed body or was too slow. pywsgi would print a traceback. Errors of
        the application do not come here: Flask logs and answers them."""
        self.close_connection = True


def connection_limit() -> int:
    """How many connections may be open at a time. Each is an open file, and RESERVED_FILES are left for other purposes.
    Raises the process's limit of open files, if MAX_CONNECTIONS needs it and the hard limit allows it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = MAX_CONNECTIONS + RESERVED_FILES
    if soft < wanted:
        soft = min(wanted, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    return max(1, min(MAX_CONNECTIONS, soft - RESERVED_FILES))


class _Connections(Pool):  # type: ignore[misc]
    """At the limit, a new connection replaces the oldest. So silent ones cannot keep out the health check."""

    def __init__(self, limit: int) -> None:
        super().__init__()  # without a size: the server would stop to accept at it
        self._limit = limit
        self._open: dict[Any, Any] = {}  # greenlet → its socket, the oldest first

    def spawn(self, *args: Any) -> None:
        if len(self._open) >= self._limit:
            oldest = self._open.pop(next(iter(self._open)))
            with suppress(OSError):  # the client has disconnected
                oldest.shutdown(socket.SHUT_RDWR)  # its greenlet then reads the end, and closes it
        opened = super().spawn(*args)
        [connection, *_] = args[-1]
        self._open[opened] = connection
        opened.rawlink(lambda ended: self._open.pop(ended, None))


def make_server(app: Flask, address: str, port: int) -> WSGIServer:
    pool = _Connections(connection_limit())
    # Without a log, which clients could fill with their errors.
    quiet = {"log": None, "error_log": None}
    return WSGIServer((address, port), app, spawn=pool, backlog=BACKLOG, handler_class=_Handler, **quiet)


def serve_in_thread(app: Flask, address: str, port: int) -> threading.Thread:
    """Serves until the process ends."""

    def serve() -> None:
        # The server has to be created in its thread, because gevent has one event loop per thread.
        make_server(app, address, port).serve_forever()

    thread = threading.Thread(target=serve, name="http", daemon=True)
    thread.start()
    return thread
