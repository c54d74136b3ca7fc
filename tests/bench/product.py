"""A project of this load balancer, started and changed with its own commands, as its users do."""

from __future__ import annotations

import http.client
import json
import shutil
import socket
import subprocess
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from bench.host import RUN, BenchError, address_of, docker, free_port

ROOT = Path(__file__).resolve().parents[2]
# No load reaches this target, so only the bench changes the number of backends.
NO_SCALING = ("--target", "1000000000", "--max", "8")
NGINX = ("--backend-port", "8000", "--health", "tcp", "--command", "sh /bench/backend.sh")


class Product:
    def __init__(self, name: str, *flags: str) -> None:
        self.project, self.port, manager = f"{RUN}-{name}", free_port(), free_port()
        self._flags = ("--project", self.project, "--port", str(self.port), "--manager-port", str(manager))
        self._flags += (*NO_SCALING, *flags)
        self._manager, self.run_dir = manager, ROOT / "run" / self.project

    def begin(self, *flags: str) -> subprocess.Popen[str]:
        """Starts ./run.sh, for a new project or with changed settings."""
        command = [str(ROOT / "run.sh"), *self._flags, *flags]
        return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

    def up(self, *flags: str) -> None:
        finish(self.begin(*flags))

    def down(self) -> subprocess.Popen[str]:
        command = [str(ROOT / "stop.sh"), "--project", self.project, "--now"]
        return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

    def backends(self) -> list[dict[str, Any]]:
        with urllib.request.urlopen(f"http://127.0.0.1:{self._manager}/status", timeout=10) as answer:
            return list(json.load(answer)["backends"])

    def names(self, state: str = "active") -> list[str]:
        return [backend["name"] for backend in self.backends() if backend["state"] == state]

    def addresses(self) -> list[str]:
        return [address_of(name) for name in self.names()]

    def order(self, count: int) -> None:
        """Orders a number of backends through the Unix socket."""
        connection = http.client.HTTPConnection("localhost")
        connection.sock = socket.socket(socket.AF_UNIX)
        connection.sock.connect(str(self.run_dir / "manager.sock"))
        connection.request("POST", "/scale", json.dumps({"min": count, "max": count}))
        answer = connection.getresponse()
        if answer.status not in (200, 204):
            raise BenchError(f"/scale: {answer.status} {answer.read()!r}")
        connection.close()

    def scale(self, count: int, spares: int = 0) -> None:
        """Orders a number of backends and waits until there are that many active ones, and no others but spares."""
        self.order(count)

        def settled() -> bool:
            states = [backend["state"] for backend in self.backends()]
            return states.count("active") == count and len(states) == count + spares

        wait_for(settled, f"{count} backends and {spares} spares of {self.project}")

    def processes(self) -> list[int]:
        """The ids of the manager, its supervisor, and the balancer's processes."""
        manager = int((self.run_dir / "manager.pid").read_text())
        parent = Path(f"/proc/{manager}/stat").read_text().rpartition(")")[2].split()[1]
        return [manager, int(parent), *processes_of(f"{self.project}-balancer")]


def processes_of(container: str) -> list[int]:
    _title, *rows = docker("top", container, "-eo", "pid").splitlines()
    return [int(row) for row in rows]


def finish(process: subprocess.Popen[str]) -> None:
    output, _ = process.communicate(timeout=300)
    if process.returncode:
        raise BenchError(f"{process.args}: status {process.returncode}: {output}")


def wait_for(condition: Callable[[], bool], what: str, seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise BenchError(f"not within {seconds:g} s: {what}")
        time.sleep(0.1)


@contextmanager
def running(products: Sequence[Product]) -> Iterator[None]:
    """Starts several projects at once, and stops them at the end."""
    try:
        for process in [product.begin() for product in products]:
            finish(process)
        yield
    finally:
        for process in [product.down() for product in products]:
            finish(process)
        for product in products:
            shutil.rmtree(product.run_dir, ignore_errors=True)
