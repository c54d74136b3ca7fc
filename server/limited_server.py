"""An HTTP server that idle, slow and hostile clients cannot fill up: gevent's pywsgi with deadlines and limits.

- An idle connection costs some 16 KB and no thread. It is closed after `idle_timeout`.
- A request has to arrive completely, header and body, within REQUEST_TIMEOUT of its first byte.
- A client that does not read its answers is disconnected after SEND_TIMEOUT.
- Above `max_connections`, a connection's request carries `environ[FULL] = True`, so that the application can refuse it.
  RESERVE more of them are accepted for that; any beyond are closed unanswered.
- A malformed request is answered with 400 and is not logged: callers must not be able to fill the log.
"""

from __future__ import annotations

import resource
from collections.abc import Callable
from http.client import HTTPException
from socket import IPPROTO_TCP, SO_SNDBUF, SOL_SOCKET, TCP_NODELAY
from typing import Any

import gevent
from gevent.pywsgi import WSGIHandler, WSGIServer

REQUEST_TIMEOUT = 10.0  # seconds from a request's first byte to its last
SEND_TIMEOUT = 20.0  # seconds without room for more of an answer, as the client does not read
FULL_IDLE_TIMEOUT = 1.0  # seconds that a connection above the limit has to begin its request
RESERVE = 256  # connections above the limit that are refused with an answer
OTHER_FILES = 64  # files that the process needs beside its connections
SEND_BUFFER = 16_384  # bytes in the kernel for answers that a client does not read
READ_BUFFER = 1024  # bytes; pywsgi's own 8 KiB would be most of what an idle connection costs
BODY_CHUNK = 65_536  # bytes

FULL = "limited_server.full"  # key of a request's environ

StartResponse = Callable[..., Any]
BAD_REQUEST = "400", b"HTTP/1.1 400 Bad Request\r\nConnection: close\r\nContent-Length: 0\r\n\r\n"
REQUEST_TIMED_OUT = "408", b"HTTP/1.1 408 Request Timeout\r\nConnection: close\r\nContent-Length: 0\r\n\r\n"


def raise_file_limit() -> int:
    """Raises the soft limit of open files to the hard one. Returns how many connections that allows."""
    _soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    if hard == resource.RLIM_INFINITY:
        return 1_000_000
    return max(1, hard - RESERVE - OTHER_FILES)


class Handler(WSGIHandler):
    """The requests of one connection, each with its deadlines."""

    ignored_socket_errors = (*WSGIHandler.ignored_socket_errors, "timed out")  # not logged: SEND_TIMEOUT

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.socket.setsockopt(IPPROTO_TCP, TCP_NODELAY, 1)  # header and body are sent one after the other
        self.socket.setsockopt(SOL_SOCKET, SO_SNDBUF, SEND_BUFFER)
        self.rfile = self.socket.makefile("rb", READ_BUFFER)
        self.above_limit = self.socket in self.server.above_limit

    def handle_one_request(self) -> tuple[str, bytes] | bool | None:
        """What pywsgi wants to hear: True to go on, None to close, or (status, the whole answer) and close."""
        if not self._request_begins():
            return None
        self.server.busy += 1
        try:
            with gevent.Timeout(REQUEST_TIMEOUT) as self.deadline:
                result: tuple[str, bytes] | bool | None = super().handle_one_request()
                return result
        except gevent.Timeout:
            return REQUEST_TIMED_OUT
        except (OSError, ValueError):  # the client is gone, or a header line that is none
            return BAD_REQUEST
        finally:
            self.server.busy -= 1

    def _request_begins(self) -> bool:
        """Waits for the first byte of a request. False when the connection has ended or was idle for too long."""
        self.socket.settimeout(FULL_IDLE_TIMEOUT if self.above_limit else self.server.idle_timeout)
        try:
            return bool(self.rfile.peek(1))
        except OSError:  # a timeout, too
            return False
        finally:
            self.socket.settimeout(SEND_TIMEOUT)

    def read_request(self, raw_requestline: str) -> bool:
        """Reads the header. False makes pywsgi answer 400; an exception would be logged with a traceback."""
        try:
            return bool(super().read_request(raw_requestline))
        except (HTTPException, OSError, ValueError):
            return False

    def get_environ(self) -> dict[str, Any]:
        """The request's environment, once its body has been read and thrown away, for no path here wants one."""
        environ: dict[str, Any] = super().get_environ()
        while self.wsgi_input.read(BODY_CHUNK):
            pass
        self.deadline.close()  # the whole request is here; its answer may take longer
        environ[FULL] = self.above_limit
        return environ


class LimitedServer(WSGIServer):
    """An HTTP server for `application` that counts.

    `connections` are open now, the sockets in `above_limit` among them. `busy` of them have a request that is being
    read or answered. `idle_timeout` are the seconds that a connection has to begin its first or next request.
    """

    handler_class = Handler
    backlog = 4096  # the kernel reduces it to net.core.somaxconn
    max_accept = 20  # new connections before those that are open get their turn, however many wait

    def __init__(
        self, listener: tuple[str, int], application: Callable[..., Any], max_connections: int, idle_timeout: float
    ) -> None:
        super().__init__(listener, application, log=None)
        self.idle_timeout = idle_timeout
        self.max_connections = max_connections
        self.connections = 0
        self.above_limit: set[Any] = set()
        self.busy = 0

    def do_handle(self, *args: Any) -> None:
        """Called with each accepted socket and its address."""
        self.connections += 1
        if self.connections > self.max_connections:  # decided here: the handler begins after others were accepted
            self.above_limit.add(args[0])
        if self.connections > self.max_connections + RESERVE:
            self.do_close(*args)
            return
        super().do_handle(*args)

    def do_close(self, *args: Any) -> None:
        """Called once for each socket that do_handle was called with."""
        self.connections -= 1
        self.above_limit.discard(args[0])
        super().do_close(*args)
