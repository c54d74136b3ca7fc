"""Temporary network namespaces on their own bridge, with sockets and tools in them.

A namespace exists as long as its file descriptor, so nothing remains after a test. `with namespace:` moves the calling
thread into it: sockets created there stay there, and programs started there run there. The bridge has its own
namespace, too: in the root namespace, a running Docker would filter its traffic.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import socket
import subprocess
import threading
from collections.abc import Callable, Iterator
from types import TracebackType

CLONE_NEWNET = 0x40000000
_libc = ctypes.CDLL(None, use_errno=True)


def _checked(result: int) -> None:
    if result:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


def _own() -> int:
    return os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)


class Namespace:
    def __init__(self) -> None:
        made: list[int] = []

        def make() -> None:
            _checked(_libc.unshare(CLONE_NEWNET))
            made.append(_own())

        thread = threading.Thread(target=make)
        thread.start()
        thread.join()
        self._fd = made[0]
        self._before: list[int] = []
        self.path = f"/proc/{os.getpid()}/fd/{self._fd}"
        self.run("ip", "link", "set", "lo", "up")

    def __enter__(self) -> Namespace:
        self._before.append(_own())
        _checked(_libc.setns(self._fd, CLONE_NEWNET))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        before = self._before.pop()
        _checked(_libc.setns(before, CLONE_NEWNET))
        os.close(before)

    def run(self, *argv: str, text: str | None = None) -> str:
        with self:
            done = subprocess.run(argv, input=text, capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{' '.join(argv)}: {done.stderr}"
        return done.stdout

    def close(self) -> None:
        os.close(self._fd)


class Lab:
    """Namespaces on one bridge. They are neighbours, without a default route. The bridge is in `switch`, or in a
    namespace of its own."""

    def __init__(self, switch: Namespace | None = None) -> None:
        self.switch = switch or Namespace()
        self.members: list[Namespace] = []
        self.switch.run("ip", "link", "add", "br0", "type", "bridge", "forward_delay", "0")
        self.switch.run("ip", "link", "set", "br0", "up")

    def add(self, *addresses: str) -> Namespace:
        """A namespace plugged into the bridge, with `addresses` of 198.18.0.0/16 on its eth0."""
        namespace, port = Namespace(), f"port{len(self.members)}"
        self.members.append(namespace)
        self.switch.run("ip", "link", "add", port, "type", "veth", "peer", "name", "eth0", "netns", namespace.path)
        self.switch.run("ip", "link", "set", port, "master", "br0", "up")
        namespace.run("ip", "link", "set", "eth0", "up")
        namespace.run("ip", "-batch", "-", text="".join(f"addr add {a}/16 dev eth0\n" for a in addresses))
        return namespace

    def close(self) -> None:
        for namespace in [*self.members, self.switch]:
            namespace.close()


class Server:
    """A TCP server in a namespace. Sends each connection the address that it connected to, then calls `talk`."""

    def __init__(
        self,
        namespace: Namespace,
        address: str = "0.0.0.0",
        port: int = 8000,
        talk: Callable[[socket.socket], object] | None = None,
        greet: bool = True,
    ) -> None:
        with namespace:
            self._socket = socket.socket()
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            self._socket.bind((address, port))
            self._socket.listen(4096)
        self._talk, self._greet = talk, greet
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                connection, _ = self._socket.accept()
                if self._talk is None:
                    self._answer(connection)
                else:
                    threading.Thread(target=self._answer, args=(connection,), daemon=True).start()

    def _answer(self, connection: socket.socket) -> None:
        with contextlib.suppress(OSError), connection:
            if self._greet:
                connection.sendall(connection.getsockname()[0].encode() + b"\n")
            if self._talk is not None:
                self._talk(connection)

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()


def connect(client: Namespace, address: tuple[str, int], timeout: float = 5.0) -> socket.socket:
    with client:
        return socket.create_connection(address, timeout)


def request(client: Namespace, address: tuple[str, int], timeout: float = 5.0) -> str:
    """Connects and returns the first line of the answer: the backend's address."""
    with connect(client, address, timeout) as connection:
        return connection.makefile().readline().strip()


def requests(client: Namespace, address: tuple[str, int], times: int, timeout: float = 5.0) -> Iterator[str]:
    with client:
        for _ in range(times):
            with socket.create_connection(address, timeout) as connection:
                yield connection.makefile().readline().strip()
