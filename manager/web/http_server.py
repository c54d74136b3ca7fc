"""One listener: gevent's pywsgi, with limits for clients that pywsgi does not have.

Guarantees:
- A request (request line, headers, body) is complete before the application gets it, and has to arrive within a
  deadline. The client has to read the answer within a second deadline. Slower clients are disconnected. A TLS handshake
  has the same deadline as a request, and delays no other connection.
- The number of connections is limited, and so is the memory for request bodies. At the limit, the connection that has
  waited longest for its client is closed. A connection whose request the application is handling (a long poll) is not.
- A client that sends without pause does not delay other clients.
- Errors of clients (resets, failed handshakes, malformed requests) are not logged.
"""

from __future__ import annotations

import io
import socket
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any

import gevent
from gevent.pool import Pool
from gevent.pywsgi import WSGIHandler, WSGIServer
from werkzeug.http import HTTP_STATUS_CODES

BODY_MAX = 1 << 20  # bytes of a request's body
HEADERS_MAX = 16384  # bytes of a request's headers
PIECE = 1 << 16  # bytes of one read from a body

Application = Callable[..., Any]


@dataclass(frozen=True)
class Limits:
    """The limits of one listener."""

    connections: int = 4096
    request: float = 5.0  # seconds for a TLS handshake, and for each request including the wait for it
    answer: float = 30.0  # seconds until the client has read all of an answer
    bodies: int = 64 << 20  # bytes of all request bodies that are being read


class Server(WSGIServer):
    """One listener and its connections."""

    def __init__(self, listener: socket.socket, application: Application, tls: Any, limits: Limits) -> None:
        self.limits = limits
        # The greenlets that wait for their client, longest wait first, with the bytes of body that each has read.
        self._waiting: dict[Any, int] = {}
        self._body_bytes = 0
        # Accepted in one pass of the loop. The pool has room for them, because a connection that was closed at the
        # limit ends only after that pass.
        self.max_accept = min(100, limits.connections)
        pool = Pool(limits.connections + self.max_accept)
        address = listener.getsockname()
        # Without this name, pywsgi would resolve it by DNS.
        environ = {"SERVER_NAME": address[0] if isinstance(address, tuple) else "localhost"}
        options: dict[str, Any] = {"handler_class": _Connection, "log": None, "error_log": None}
        # The handshake follows in wrap_socket_and_handle, with a deadline.
        if tls is not None:
            options |= {"ssl_context": tls, "do_handshake_on_connect": False}
        super().__init__(listener, application, spawn=pool, environ=environ, **options)

    def do_handle(self, *args: Any) -> None:
        if len(self.pool) >= self.limits.connections:
            self._close(next(iter(self._waiting), None))
        super().do_handle(*args)

    def wrap_socket_and_handle(self, client_socket: Any, address: Any) -> None:
        # Raises if the client has disconnected already: gevent would not close such a socket.
        client_socket.getpeername()
        with closing(self.wrap_socket(client_socket, **self.ssl_args)) as secured:
            with self.waiting_for_client(), gevent.Timeout(self.limits.request):
                secured.do_handshake()
            self.handle(secured, address)

    def handle(self, sock: Any, address: Any) -> None:
        with suppress(OSError):  # the client has disconnected
            super().handle(sock, address)

    @contextmanager
    def waiting_for_client(self) -> Iterator[None]:
        """Within this context the current greenlet waits for its client, so its connection may be closed at a limit."""
        self._waiting[gevent.getcurrent()] = 0
        try:
            yield
        finally:
            self.end_waiting()

    def end_waiting(self) -> None:
        """From now on, the current greenlet's connection is not closed at a limit, and its body is not counted."""
        self._body_bytes -= self._waiting.pop(gevent.getcurrent(), 0)

    def count_body(self, size: int) -> None:
        """Counts bytes of body that the current greenlet has read. Over the limit, closes another connection that is
        sending a body."""
        current = gevent.getcurrent()
        if current not in self._waiting:  # its connection is being closed
            return
        self._waiting[current] += size
        self._body_bytes += size
        if self._body_bytes > self.limits.bodies:
            others = (greenlet for greenlet, held in self._waiting.items() if held and greenlet is not current)
            self._close(next(others, None))

    def _close(self, greenlet: Any) -> None:
        if greenlet is not None:
            self._body_bytes -= self._waiting.pop(greenlet)
            greenlet.kill(block=False)


class _Refused(ValueError):
    """The request is answered with this status and does not reach the application."""

    def __init__(self, status: HTTPStatus) -> None:
        super().__init__(status)
        self.status = status


class _FromClient(socket.SocketIO):
    """The bytes from a client. Each read lets other greenlets run first, even if the client sends without pause."""

    def readinto(self, buffer: Any) -> int | None:
        gevent.sleep(0)
        return super().readinto(buffer)


class _Connection(WSGIHandler):
    """One connection: its requests one after another, each complete before the application gets it."""

    close_connection: bool
    environ: Any
    _deadline: Any  # a gevent.Timeout, for the request that is being read

    def __init__(self, sock: Any, address: Any, server: Server) -> None:
        super().__init__(sock, address, server, rfile=io.BufferedReader(_FromClient(sock, "rb")))

    def handle_one_request(self) -> bool | None:
        """True if another request may follow on the connection."""
        # Lets other greenlets run between requests that a client sends in one packet.
        gevent.sleep(0)
        result = None
        # With False, the timeout ends the block below and its exception does not leave it.
        with gevent.Timeout(self.server.limits.request, False) as self._deadline, self.server.waiting_for_client():
            result = super().handle_one_request()
            if isinstance(result, tuple):
                self._refuse(HTTPStatus(int(result[0])))
        return True if result is True else None

    def read_request(self, raw_requestline: str) -> bool:
        if len(raw_requestline.split()) != 3 or not raw_requestline.isascii():  # HTTP/0.9, or no URL
            raise _Refused(HTTPStatus.BAD_REQUEST)
        super().read_request(raw_requestline)
        # With another encoding, the end of the body would not be known.
        if self.headers.get("Transfer-Encoding", "chunked").lower() != "chunked":
            raise _Refused(HTTPStatus.NOT_IMPLEMENTED)
        options = self.headers.get("Connection", "").lower().split(",")
        self.close_connection = self.close_connection or "close" in (option.strip() for option in options)
        return True

    def MessageClass(self, source: Any, *_: Any) -> Any:  # noqa: N802 - pywsgi's name
        """Reads the headers, up to HEADERS_MAX."""
        block = bytearray()
        line = b"-"
        while line.strip(b"\r\n"):
            line = source.readline(HEADERS_MAX + 1 - len(block))
            block += line
            if len(block) > HEADERS_MAX:
                raise _Refused(HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE)
            if not line.endswith(b"\n"):
                raise OSError("the request ends within its headers")
        return super().MessageClass(io.BytesIO(block))

    def _handle_client_error(self, ex: Exception) -> tuple[str, bytes] | None:
        if isinstance(ex, OSError):
            return None
        status = ex.status if isinstance(ex, _Refused) else HTTPStatus.BAD_REQUEST
        return str(int(status)), b""

    def handle_one_response(self) -> None:
        try:
            body = self._read_body()
        except _Refused as refused:
            self._refuse(refused.status)
            return
        # The request is complete. From here on, only the answer has a deadline.
        self._deadline.close()
        self.server.end_waiting()
        self.environ["wsgi.input"] = io.BytesIO(body)
        self.environ["wsgi.input_terminated"] = True
        super().handle_one_response()
        self.environ = None

    def _read_body(self) -> bytes:
        if (self.content_length or 0) > BODY_MAX:
            raise _Refused(HTTPStatus.REQUEST_ENTITY_TOO_LARGE)
        body = bytearray()
        try:
            while len(body) <= BODY_MAX and (piece := self.wsgi_input.read(PIECE)):
                body += piece
                self.server.count_body(len(piece))
        except (OSError, ValueError) as error:  # malformed chunks, or the client has disconnected
            raise _Refused(HTTPStatus.BAD_REQUEST) from error
        if len(body) > BODY_MAX:
            raise _Refused(HTTPStatus.REQUEST_ENTITY_TOO_LARGE)
        return bytes(body)

    def _refuse(self, status: HTTPStatus) -> None:
        """Answers without the application and closes the connection: the beginning of the next request is unknown."""
        self.close_connection = True
        # Flask's text, because Python's own differs between versions: since 3.13, 413 is "Content Too Large" there.
        phrase = HTTP_STATUS_CODES[status]
        body = f"{phrase}\n"
        self.socket.sendall(
            f"HTTP/1.1 {int(status)} {phrase}\r\nConnection: close\r\nContent-Type: text/plain\r\n"
            f"X-Content-Type-Options: nosniff\r\nContent-Length: {len(body)}\r\n\r\n{body}".encode()
        )
        # Closing a socket with unread bytes resets the connection, and the client may lose the answer. So read them.
        self.socket.shutdown(socket.SHUT_WR)
        while self.rfile.read1(PIECE):
            pass

    def finalize_headers(self) -> None:
        # pywsgi sends this header to HTTP/1.0 clients only. Without it, a client would send its next request to a
        # closed connection.
        if self.close_connection and self.request_version == "HTTP/1.1":
            self.response_headers.append((b"Connection", b"close"))
        super().finalize_headers()

    def process_result(self) -> None:
        self.environ["wsgi.input"] = io.BytesIO()  # frees the request's body before the answer is sent
        with self.server.waiting_for_client(), gevent.Timeout(self.server.limits.answer):
            super().process_result()

    def handle_error(self, t: Any, v: Any, tb: Any) -> None:
        if issubclass(t, (OSError, gevent.GreenletExit, gevent.Timeout)):
            self.close_connection = True  # the client has disconnected, was too slow, or its connection was closed
        else:
            super().handle_error(t, v, tb)
