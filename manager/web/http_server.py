"""One listener: reads requests, with limits that pywsgi does not have, and lets a WSGI application answer them.

Guarantees:
- A request (request line, headers, body) is read within a deadline before the application sees it. Whoever is slower is
  cut off, and so is whoever does not take the answer. A TLS handshake has the same deadline, in its caller's greenlet.
- Connections, and the memory for bodies, have a limit. Past it, the connection that has taken longest to send its
  request, or to take its answer, is cut off. What the application holds (a long poll) is not.
- However fast a caller sends, others get their turn.
- What callers do wrong (resets, bad handshakes, broken requests) is no log line and no traceback.
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

BODY_MAX = 1 << 20  # bytes of a request's body
HEADERS_MAX = 16384  # bytes of a request's headers
PIECE = 1 << 16  # bytes of a body that are read at once

Application = Callable[..., Any]


@dataclass(frozen=True)
class Limits:
    """Of one listener."""

    connections: int = 4096
    request: float = 5.0  # seconds for a TLS handshake, and for each request from the end of the one before
    answer: float = 30.0  # seconds until the caller has taken all of an answer
    bodies: int = 64 << 20  # bytes of request bodies that are being read


class Server(WSGIServer):
    """One listener and its connections."""

    def __init__(self, listener: socket.socket, application: Application, tls: Any, limits: Limits) -> None:
        self.limits = limits
        # The greenlets that may be cut off, those that have taken longest first, and the bytes of body each holds.
        self._unfinished: dict[Any, int] = {}
        self._body_bytes = 0
        # So many are accepted before a connection that was cut off has ended.
        self.max_accept = min(100, limits.connections)
        pool = Pool(limits.connections + self.max_accept)
        address = listener.getsockname()
        # Without a name the server would ask DNS for it.
        environ = {"SERVER_NAME": address[0] if isinstance(address, tuple) else "localhost"}
        options: dict[str, Any] = {"handler_class": _Connection, "log": None, "error_log": None}
        if tls is not None:
            options |= {"ssl_context": tls, "do_handshake_on_connect": False}
        super().__init__(listener, application, spawn=pool, environ=environ, **options)

    def do_handle(self, *args: Any) -> None:
        if len(self.pool) >= self.limits.connections:
            self._cut_off(next(iter(self._unfinished), None))
        super().do_handle(*args)

    def wrap_socket_and_handle(self, client_socket: Any, address: Any) -> None:
        client_socket.getpeername()  # raises where the caller has gone: gevent would leave that socket open
        with closing(self.wrap_socket(client_socket, **self.ssl_args)) as secured:
            with self.may_be_cut_off(), gevent.Timeout(self.limits.request):
                secured.do_handshake()
            self.handle(secured, address)

    def handle(self, sock: Any, address: Any) -> None:
        with suppress(OSError):  # the caller has gone
            super().handle(sock, address)

    @contextmanager
    def may_be_cut_off(self) -> Iterator[None]:
        """While the calling greenlet waits for its caller."""
        self._unfinished[gevent.getcurrent()] = 0
        try:
            yield
        finally:
            self.finished()

    def finished(self) -> None:
        """The calling greenlet waits for its caller no longer."""
        self._body_bytes -= self._unfinished.pop(gevent.getcurrent(), 0)

    def count_body(self, size: int) -> None:
        """The calling greenlet has read so many bytes more of a body. Over the limit, another one is cut off."""
        current = gevent.getcurrent()
        if current not in self._unfinished:  # it is being cut off
            return
        self._unfinished[current] += size
        self._body_bytes += size
        if self._body_bytes > self.limits.bodies:
            others = (greenlet for greenlet, held in self._unfinished.items() if held and greenlet is not current)
            self._cut_off(next(others, None))

    def _cut_off(self, greenlet: Any) -> None:
        if greenlet is not None:
            self._body_bytes -= self._unfinished.pop(greenlet)
            greenlet.kill(block=False)


class _Refused(ValueError):
    """The request is answered with this status in place of the application's answer."""

    def __init__(self, status: HTTPStatus) -> None:
        super().__init__(status)
        self.status = status


class _FromCaller(io.RawIOBase):
    """What a caller sends. Other greenlets get their turn before each read, however fast it comes."""

    def __init__(self, sock: Any) -> None:
        self._socket = sock

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        gevent.sleep(0)
        return int(self._socket.recv_into(buffer))


class _Connection(WSGIHandler):
    """One connection: its requests one after another, each read as a whole before the application sees it."""

    close_connection: bool
    environ: Any

    def __init__(self, sock: Any, address: Any, server: Server) -> None:
        super().__init__(sock, address, server, rfile=io.BufferedReader(_FromCaller(sock)))
        self._deadline = gevent.Timeout(server.limits.request)

    def handle_one_request(self) -> bool | None:
        gevent.sleep(0)  # a caller who sends many requests at once lets others have their turn
        self._deadline = gevent.Timeout.start_new(self.server.limits.request)
        try:
            with self.server.may_be_cut_off():
                answer = super().handle_one_request()
                if isinstance(answer, tuple):
                    self._refuse(HTTPStatus(int(answer[0])))
        except gevent.Timeout as timeout:
            if timeout is not self._deadline:
                raise
            return None
        finally:
            self._deadline.close()
        return True if answer is True else None

    def read_request(self, raw_requestline: str) -> bool:
        if len(raw_requestline.split()) != 3 or not raw_requestline.isascii():  # HTTP/0.9, or no URL
            raise _Refused(HTTPStatus.BAD_REQUEST)
        super().read_request(raw_requestline)
        if self.headers.get("Transfer-Encoding", "chunked").lower() != "chunked":
            raise _Refused(HTTPStatus.NOT_IMPLEMENTED)
        options = self.headers.get("Connection", "").lower().split(",")
        self.close_connection = self.close_connection or "close" in (option.strip() for option in options)
        return True

    def MessageClass(self, source: Any, *_: Any) -> Any:  # noqa: N802 - pywsgi's name
        """Reads the headers."""
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
        self._deadline.close()
        self.server.finished()
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
        except (OSError, ValueError) as error:  # chunks that are none, or the caller has gone
            raise _Refused(HTTPStatus.BAD_REQUEST) from error
        if len(body) > BODY_MAX:
            raise _Refused(HTTPStatus.REQUEST_ENTITY_TOO_LARGE)
        return bytes(body)

    def _refuse(self, status: HTTPStatus) -> None:
        """Answers in place of the application, and closes: where the next request would begin is not known."""
        self.close_connection = True
        body = f"{status.phrase}\n"
        self.socket.sendall(
            f"HTTP/1.1 {int(status)} {status.phrase}\r\nConnection: close\r\nContent-Type: text/plain\r\n"
            f"X-Content-Type-Options: nosniff\r\nContent-Length: {len(body)}\r\n\r\n{body}".encode()
        )
        # To close a socket with unread bytes would reset the connection, and the answer could be lost.
        self.socket.shutdown(socket.SHUT_WR)
        while self.rfile.read1(PIECE):
            pass

    def finalize_headers(self) -> None:
        # pywsgi sends it only to HTTP/1.0. Else the client keeps the connection and loses its next request.
        if self.close_connection and self.request_version == "HTTP/1.1":
            self.response_headers.append((b"Connection", b"close"))
        super().finalize_headers()

    def process_result(self) -> None:
        self.environ["wsgi.input"] = io.BytesIO()  # the body is not held until the caller takes the answer
        with self.server.may_be_cut_off(), gevent.Timeout(self.server.limits.answer):
            super().process_result()

    def handle_error(self, t: Any, v: Any, tb: Any) -> None:
        if issubclass(t, (OSError, gevent.GreenletExit, gevent.Timeout)):
            self.close_connection = True  # the caller has gone, was too slow, or was cut off
        else:
            super().handle_error(t, v, tb)
