"""Serves a WSGI application on several sockets, from one gevent hub in one thread.

Guarantees:
- A client cannot delay another one. Each listener has its own limits (`http_server.Limits`), so that clients of one
  listener cannot block another listener.
- The application runs on the hub's thread and must not block it: it may wait with `Listeners.wait_for` only. Other
  threads end that wait with `Listeners.notify`. What computes for long is done by `Listeners.compute`.
- Nothing is monkey-patched, so all other threads are ordinary threads.
"""

from __future__ import annotations

import logging
import os
import resource
import socket
import ssl
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import gevent
import gevent.ssl
from gevent.event import Event

from web.http_server import Application, Limits, Server

BACKLOG = 1024  # connections that wait in the kernel to be accepted; net.core.somaxconn may lower it
IP_FREEBIND = 15  # <linux/in.h>; Python has no name for it
FILES_RESERVED = 512  # file descriptors for everything but connections
STOP_TIMEOUT = 1.0  # seconds
COMPUTING_MAX = 4  # calls of `compute` that run or wait at a time; each one holds a connection

log = logging.getLogger("manager")

T = TypeVar("T")


def bind_tcp(address: str, port: int) -> socket.socket:
    """A listening socket. The address need not exist yet: Docker may create its bridge after the manager restarts."""
    listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listener.setsockopt(socket.IPPROTO_IP, IP_FREEBIND, 1)
    # Accepted connections inherit it. An answer is two writes, headers and body; with Nagle's algorithm, the second one
    # would wait for an acknowledgement of the first.
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return _listen(listener, (address, port))


def bind_unix(path: Path) -> socket.socket:
    """A listening Unix socket that only its owner can connect to."""
    path.unlink(missing_ok=True)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    # Linux creates the file with the mode of the unbound socket, so it never has a wider mode, whatever the umask.
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
    """For `Listeners.add`: the certificate and its key, both in one file. Raises OSError if they are not usable."""
    context = gevent.ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.options |= ssl.OP_NO_RENEGOTIATION
    context.load_cert_chain(pem)
    return context


def raise_file_limit() -> None:
    """Raises the process's soft limit of open files to its hard limit."""
    _soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def connections_each(wanted: int, files: int, listeners: int) -> int:
    """Connections for each listener, at most `wanted`, so that FILES_RESERVED of `files` descriptors are left."""
    return max(16, min(wanted, (files - FILES_RESERVED) // listeners))


class Busy(Exception):
    """COMPUTING_MAX calls of `Listeners.compute` run or wait already."""


class Listeners:
    """All listeners of a process. `add` each, then `start`. After `stop` they cannot be started again."""

    def __init__(self, limits: Limits | None = None) -> None:
        self._limits = limits or Limits()
        self._planned: list[tuple[socket.socket, Application, Any]] = []
        self._thread = threading.Thread(target=self._run, name="listeners", daemon=True)
        self._started = threading.Event()
        self._failure: Exception | None = None
        self._lock = threading.Lock()  # held while another thread uses the loop, or the loop ends
        self._loop: Any = None  # gevent's, while it runs
        self._notified = Event()  # each notify sets it and puts a new one in its place
        self._stopping = Event()
        self._computing = 0  # calls of `compute`

    def add(self, listener: socket.socket, application: Application, tls: Any = None) -> None:
        """Serves `application` on a socket made by `bind_tcp` or `bind_unix`; with TLS if there is a context."""
        self._planned.append((listener, application, tls))

    def start(self) -> None:
        """Returns when all listeners accept connections. Raises the error of one that cannot."""
        self._thread.start()
        self._started.wait()
        if self._failure is not None:
            raise self._failure

    def is_alive(self) -> bool:
        """True from `start` to `stop`, unless the hub fails."""
        return self._thread.is_alive()

    def stop(self) -> None:
        """Closes all listeners. Requests that the application is handling have STOP_TIMEOUT seconds to end."""
        self._call_on_hub(self._stopping.set)
        if self._thread.is_alive():
            self._thread.join()

    def notify(self) -> None:
        """Makes every `wait_for` call its function again. For any thread; never blocks."""
        self._call_on_hub(self._renew)

    def wait_for(self, find: Callable[[], T | None], seconds: float) -> T | None:
        """The first result of `find` that is not None; None after `seconds`. Calls `find` now and after each `notify`;
        its exceptions propagate. For the application: only the current greenlet waits."""
        deadline = time.monotonic() + seconds
        while True:
            notified = self._notified  # read before the call, so that a notify during the call is not missed
            found = find()
            left = deadline - time.monotonic()
            if found is not None or left <= 0:
                return found
            notified.wait(left)

    def compute(self, function: Callable[[], T]) -> T:
        """The result of `function`, which must not raise. It runs on another thread, one at a time. Raises Busy if too
        many wait already. For the application: only the current greenlet waits."""
        if self._computing >= COMPUTING_MAX:
            raise Busy
        self._computing += 1
        try:
            return gevent.get_hub().threadpool.apply(function)  # type: ignore[no-any-return]
        finally:
            self._computing -= 1

    def _call_on_hub(self, callback: Callable[[], None]) -> None:
        """For other threads. Does nothing after the hub has ended."""
        with self._lock:
            if self._loop is not None:
                self._loop.run_callback_threadsafe(callback)

    # -- on the hub's thread -------------------------------------------------------------------------------------------

    def _run(self) -> None:
        hub = gevent.get_hub()
        hub.NOT_ERROR = (*hub.NOT_ERROR, OSError, gevent.Timeout)  # errors of clients
        hub.print_exception = _log_failure
        hub.threadpool_size = 1  # the threads share one processor, so more of them would delay the hub's
        servers: list[Server] = []
        try:
            servers += self._servers()
            for server in servers:
                server.start()
            with self._lock:
                self._loop = hub.loop
        # `start` raises the error in the caller's thread.
        except Exception as error:
            self._failure = error
            self._stopping.set()
        self._started.set()
        self._stopping.wait()
        gevent.joinall([gevent.spawn(server.stop, STOP_TIMEOUT) for server in servers])
        with self._lock:
            self._loop = None
        hub.destroy(destroy_loop=True)

    def _servers(self) -> list[Server]:
        files = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        connections = connections_each(self._limits.connections, files, len(self._planned))
        limits = replace(self._limits, connections=connections)
        return [Server(listener, application, tls, limits) for listener, application, tls in self._planned]

    def _renew(self) -> None:
        notified, self._notified = self._notified, Event()
        notified.set()


def _log_failure(_context: object, kind: Any, error: Any, trace: Any) -> None:
    log.error("a connection failed", exc_info=(kind, error, trace))
