"""Serves a WSGI application on several sockets, from one gevent hub in one thread, so that no caller holds up another.

Guarantees, for each listener on its own:
- A request (request line, headers, body) is read within a deadline before the application sees it. Whoever is slower is
  cut off, and so is whoever does not take the answer. A TLS handshake has the same deadline, in its caller's greenlet.
- It has a limit of connections and of memory for bodies. Past it, the connection that has taken longest to send its
  request, or to take its answer, is cut off. What the application holds (a long poll) is not.
- What callers do wrong (resets, bad handshakes, broken requests) is no log line and no traceback.

An application runs on the hub's thread. It may wait only by `Listeners.wait_for`; other threads end that waiting by
`Listeners.notify`. Nothing is monkey-patched: all other threads stay as they are.
"""

from __future__ import annotations

import io
import logging
import os
import resource
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, replace
from http import HTTPStatus
from pathlib import Path
from typing import Any, TypeVar

import gevent
import gevent.ssl
from gevent.event import Event
from gevent.pool import Pool
from gevent.pywsgi import WSGIHandler, WSGIServer

BODY_MAX = 1 << 20  # bytes of a request's body
HEADERS_MAX = 16384  # bytes of a request's headers
PIECE = 1 << 16  # bytes of a body that are read at once
BACKLOG = 1024  # connections that the kernel keeps until they are accepted; net.core.somaxconn may lower it
IP_FREEBIND = 15  # <linux/in.h>; Python has no name for it
FILES_WANTED = 1 << 16  # file descriptors, where the hard limit allows any number
FILES_RESERVED = 512  # file descriptors that are left for all other work of the process

log = logging.getLogger("manager")

Application = Callable[..., Any]
T = TypeVar("T")


@dataclass(frozen=True)
class Limits:
    """Of one listener."""

    connections: int = 4096
    request: float = 5.0  # seconds for a TLS handshake, and for each request from the end of the one before
    answer: float = 30.0  # seconds until the caller has taken all of an answer
    bodies: int = 64 << 20  # bytes of request bodies that are being read


def bind_tcp(address: str, port: int) -> socket.socket:
    """A listening socket, bound even before the address is up: Docker's bridge may come after a restarted manager."""
    listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listener.setsockopt(socket.IPPROTO_IP, IP_FREEBIND, 1)
    # Linux hands it down to connections. Headers and body are sent one after the other; the body is not to wait.
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return _listen(listener, (address, port))


def bind_unix(path: Path) -> socket.socket:
    """A listening Unix socket that only its owner can connect to."""
    path.unlink(missing_ok=True)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    # Linux makes the file with the unbound socket's own mode, so it never has another one, whatever the umask.
    os.fchmod(listener.fileno(), 0o600)
    return _listen(listener, str(path))


def _listen(listener: socket.socket, address: Any) -> socket.socket:
    try:
        listener.bind(address)
        listener.listen(BACKLOG)
        listener.setblocking(False)
    except OSError:
        listener.close()
        raise
    return listener


def tls_context(pem: Path) -> Any:
    """For `Listeners.add`: the certificate and its key, both in one file. Raises OSError where they cannot be used."""
    context = gevent.ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.options |= ssl.OP_NO_RENEGOTIATION
    context.load_cert_chain(pem)
    return context


def raise_file_limit() -> int:
    """Raises this process's limit of open files as far as it may; the limit now in force."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = FILES_WANTED if hard == resource.RLIM_INFINITY else min(hard, FILES_WANTED)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
    return max(soft, wanted)


def connections_each(wanted: int, files: int, listeners: int) -> int:
    """How many connections each listener may have, so that `files` descriptors are enough for all and for the rest."""
    return max(16, min(wanted, (files - FILES_RESERVED) // listeners))


class Listeners:
    """All listeners of a process. `add` each, then `start`; `stop` ends them for good."""

    def __init__(self, limits: Limits | None = None) -> None:
        self._limits = limits or Limits()
        self._planned: list[tuple[socket.socket, Application, Any]] = []
        self._thread = threading.Thread(target=self._run, name="listeners", daemon=True)
        self._started = threading.Event()
        self._lock = threading.Lock()  # held while another thread uses the two watchers below, or they are closed
        self._on_notify: Any = None
        self._on_stop: Any = None
        self._failure: BaseException | None = None
        self._notified: Any = None  # a gevent Event; each notify replaces it
        self._stop_timeout = 0.0

    def add(self, listener: socket.socket, application: Application, tls: Any = None) -> None:
        """Serves `application` on a socket made by `bind_tcp` or `bind_unix`, within TLS where there is a context."""
        self._planned.append((listener, application, tls))

    def start(self) -> None:
        """Returns when all listeners accept connections. Raises what went wrong."""
        self._thread.start()
        self._started.wait()
        if self._failure is not None:
            raise self._failure

    def is_alive(self) -> bool:
        """Whether the listeners are served: from `start` to `stop`, unless the hub fails."""
        return self._thread.is_alive()

    def stop(self, timeout: float = 1.0) -> None:
        """Closes all listeners; requests that the application has get `timeout` seconds to end, then they are cut."""
        with self._lock:
            if self._on_stop is not None:
                self._stop_timeout = timeout
                self._on_stop.send()
        if self._thread.is_alive():
            self._thread.join()

    def notify(self) -> None:
        """Has every `wait_for` call its function again. For any thread; never blocks."""
        with self._lock:
            if self._on_notify is not None:
                self._on_notify.send()

    def wait_for(self, look: Callable[[], T | None], seconds: float) -> T | None:
        """What `look` returns as soon as that is not None; None after `seconds`. For applications: only the calling
        greenlet waits. `look` is called at once and after each `notify`; what it raises ends the waiting."""
        deadline = time.monotonic() + seconds
        while True:
            notified = self._notified  # taken before the call, so that a notify during it is not missed
            found = look()
            left = deadline - time.monotonic()
            if found is not None or left <= 0:
                return found
            notified.wait(left)

    # -- on the hub's thread -------------------------------------------------------------------------------------------

    def _run(self) -> None:
        hub = gevent.get_hub()
        hub.NOT_ERROR = (*hub.NOT_ERROR, OSError, gevent.Timeout)  # callers' errors
        hub.print_exception = _log_failure
        stopping = Event()
        servers: list[_Server] = []
        try:
            with self._lock:
                self._notified = Event()
                self._on_notify, self._on_stop = hub.loop.async_(), hub.loop.async_()
                self._on_notify.start(self._renew)
                self._on_stop.start(stopping.set)
            servers += self._servers()
            for server in servers:
                server.start()
        except Exception as error:
            self._failure = error
            stopping.set()
        self._started.set()
        stopping.wait()
        gevent.joinall([gevent.spawn(server.stop, self._stop_timeout) for server in servers])
        with self._lock:
            for watcher in (self._on_notify, self._on_stop):
                watcher.stop()
                watcher.close()
            self._on_notify = self._on_stop = None
        hub.destroy(destroy_loop=True)

    def _servers(self) -> list[_Server]:
        files = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        connections = connections_each(self._limits.connections, files, len(self._planned))
        limits = replace(self._limits, connections=connections)
        return [_Server(listener, application, tls, limits) for listener, application, tls in self._planned]

    def _renew(self) -> None:
        notified, self._notified = self._notified, Event()
        notified.set()


def _log_failure(_context: object, kind: Any, error: Any, trace: Any) -> None:
    log.error("a connection failed", exc_info=(kind, error, trace))


class _Server(WSGIServer):
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

    def __init__(self, sock: Any, address: Any, server: _Server) -> None:
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
        # pywsgi says so only to HTTP/1.0. A client that is not told keeps the connection, and its next request is lost.
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
