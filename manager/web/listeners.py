"""Serves a WSGI application on several sockets, from one gevent hub in one thread, so that no caller holds up another.

Each listener has the limits of `http_server` for itself: callers of one cannot stop another. An application runs
on the hub's thread. It may wait only by `Listeners.wait_for`; other threads end that waiting by `Listeners.notify`.
Nothing is monkey-patched: all other threads stay as they are.
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

BACKLOG = 1024  # connections that the kernel keeps until they are accepted; net.core.somaxconn may lower it
IP_FREEBIND = 15  # <linux/in.h>; Python has no name for it
FILES_WANTED = 1 << 16  # file descriptors, where the hard limit allows any number
FILES_RESERVED = 512  # file descriptors that are left for all other work of the process

log = logging.getLogger("manager")

T = TypeVar("T")


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
        servers: list[Server] = []
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
