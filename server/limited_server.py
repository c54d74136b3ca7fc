"""An HTTP server that idle, slow and hostile clients cannot exhaust: gevent's pywsgi with deadlines and limits.

- An idle connection costs some 16 KB and no thread. It is closed after `idle_timeout`.
- A request has to arrive completely, header and body, within REQUEST_TIMEOUT of its first byte.
- A client that does not read its answers is disconnected after SEND_TIMEOUT.
- A connection above `max_connections` is refused: its first request is answered with 503, then it is closed. At most
  RESERVE such connections are open; any others are closed without an answer.
- A client that sends without pause does not delay other clients.
- A malformed request is answered with 400. So is one with more than HEADERS_MAX bytes of headers: pywsgi would keep
  6 MB of them in memory for each connection.
- Errors of clients (malformed requests, resets) are not logged, because clients could fill the log.
"""

from __future__ import annotations

import io
import resource
from collections.abc import Callable
from contextlib import suppress
from socket import IPPROTO_TCP, SO_SNDBUF, SOL_SOCKET, TCP_NODELAY, SocketIO
from typing import Any

import gevent
from gevent.pywsgi import WSGIHandler, WSGIServer

REQUEST_TIMEOUT = 10.0  # seconds from a request's first byte to its last
SEND_TIMEOUT = 20.0  # seconds until a client that does not read its answer is disconnected
REFUSED_IDLE_TIMEOUT = 1.0  # seconds in which a connection above the limit has to begin its request
RESERVE = 256  # connections above the limit that are refused with an answer
OTHER_FILES = 64  # open files that the process needs for other purposes
SEND_BUFFER = 16_384  # bytes in the kernel for answers that a client does not read
READ_BUFFER = 1024  # bytes; pywsgi's own 8 KiB would be most of what an idle connection costs
HEADERS_MAX = 16_384  # bytes
BODY_CHUNK = 65_536  # bytes
RETRY_AFTER = "1"  # seconds


def _closing_answer(status: str, *headers: str) -> tuple[str, bytes]:
    """An answer as pywsgi sends it before it closes the connection: the status and all bytes."""
    lines = (f"HTTP/1.1 {status}", *headers, "Connection: close", "Content-Length: 0", "", "")
    return status, "\r\n".join(lines).encode()


BAD_REQUEST = _closing_answer("400 Bad Request")
REQUEST_TIMED_OUT = _closing_answer("408 Request Timeout")
REFUSED = _closing_answer("503 Service Unavailable", f"Retry-After: {RETRY_AFTER}")


def raise_file_limit() -> int:
    """Raises the soft limit of open files to the hard one. Returns how many connections that allows."""
    _soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return max(1, hard - RESERVE - OTHER_FILES)


class FromClient(SocketIO):
    """The bytes from a client. Each read lets other greenlets run first, even if the client sends without pause."""

    def readinto(self, buffer: Any) -> int | None:
        gevent.sleep(0)
        return super().readinto(buffer)


class Handler(WSGIHandler):
    """The requests of one connection, each with its deadlines."""

    ignored_socket_errors = (*WSGIHandler.ignored_socket_errors, "timed out")  # the last one is SEND_TIMEOUT

    def __init__(self, sock: Any, address: Any, server: LimitedServer) -> None:
        super().__init__(sock, address, server, rfile=io.BufferedReader(FromClient(sock, "rb"), READ_BUFFER))
        # Header and body are two packets: without this, the second waits for the first's delayed acknowledgement.
        self.socket.setsockopt(IPPROTO_TCP, TCP_NODELAY, 1)
        # A small buffer, so that an answer that is not read is noticed early and takes little memory.
        self.socket.setsockopt(SOL_SOCKET, SO_SNDBUF, SEND_BUFFER)
        self.above_limit = self.server.connections > self.server.max_connections

    def handle_one_request(self) -> tuple[str, bytes] | bool | None:
        """Returns True to keep the connection, None to close it, or an answer to send before closing it."""
        if not self._request_begins():
            return None
        if self.above_limit:
            return REFUSED
        # From the first byte on, because a shutdown waits for the requests that are being received, too.
        self.server.busy += 1
        try:
            with gevent.Timeout(REQUEST_TIMEOUT) as self.deadline:
                result: tuple[str, bytes] | bool | None = super().handle_one_request()
                return result
        except gevent.Timeout:
            return REQUEST_TIMED_OUT
        except (OSError, ValueError):  # the client has disconnected, or the body is malformed
            return BAD_REQUEST
        finally:
            self.server.busy -= 1

    def _request_begins(self) -> bool:
        """Waits for the first byte of a request. False when the connection has ended or was idle for too long."""
        self.socket.settimeout(REFUSED_IDLE_TIMEOUT if self.above_limit else self.server.idle_timeout)
        try:
            return bool(self.rfile.peek(1))
        except OSError:  # includes TimeoutError
            return False
        finally:
            self.socket.settimeout(SEND_TIMEOUT)

    def MessageClass(self, source: Any, *_: Any) -> Any:  # noqa: N802 - pywsgi's name
        """Reads the headers."""
        block, line = bytearray(), b"-"
        while line.strip(b"\r\n"):
            line = source.readline(HEADERS_MAX + 1 - len(block))
            block += line
            if len(block) > HEADERS_MAX:
                raise ValueError("the headers are too long")
        return super().MessageClass(io.BytesIO(block))

    def _handle_client_error(self, _error: Exception) -> tuple[str, bytes]:
        """The answer to a malformed header. pywsgi would log it, too."""
        return BAD_REQUEST

    def get_environ(self) -> dict[str, Any]:
        """Reads the body, which no application here uses, and then ends the request's deadline."""
        environ: dict[str, Any] = super().get_environ()
        while self.wsgi_input.read(BODY_CHUNK):
            pass
        self.deadline.close()  # the answer may take longer
        return environ


class LimitedServer(WSGIServer):
    """An HTTP server for `application`. It counts its open `connections`.

    `busy` of them have a request that is being read or answered. `idle_timeout` is in seconds: how long a connection
    may wait before its first or next request.
    """

    handler_class = Handler
    backlog = 4096  # the kernel reduces it to net.core.somaxconn
    max_accept = 20  # new connections that are accepted before the event loop serves the open ones

    def __init__(
        self, listener: tuple[str, int], application: Callable[..., Any], max_connections: int, idle_timeout: float
    ) -> None:
        super().__init__(listener, application, log=None)
        self.max_connections, self.idle_timeout = max_connections, idle_timeout
        self.connections = self.busy = 0

    def handle(self, *connection: Any) -> None:
        """Called for each accepted connection, in the order in which they were accepted."""
        self.connections += 1
        # Above the reserve, return without reading: the caller then closes the connection.
        try:
            if self.connections <= self.max_connections + RESERVE:
                with suppress(OSError):  # the client has disconnected
                    super().handle(*connection)
        finally:
            self.connections -= 1
