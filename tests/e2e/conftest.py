from __future__ import annotations

import fcntl
import json
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import loads
import pytest

from checkout import copy_tree
from waiting import wait_until

ROOT = Path(__file__).resolve().parents[2]
FAST = ("--interval", "1", "--panic-window", "3", "--stable-window", "6", "--drain-timeout", "15")


def _engine_answers() -> bool:
    asked = ["docker", "info"]
    return bool(shutil.which("docker")) and not subprocess.run(asked, capture_output=True, check=False).returncode


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    why = "needs root" if os.geteuid() else "" if _engine_answers() else "needs a Docker Engine that answers"
    for item in items:
        if why and "e2e" in item.path.parts:
            item.add_marker(pytest.mark.skip(reason=why))


def docker(*arguments: str) -> str:
    done = subprocess.run(["docker", *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"docker {' '.join(arguments)}: {done.stderr}"
    return done.stdout.strip()


def free_port() -> int:
    """A free port, below the range of outgoing connections, one of which could take it later."""
    while True:
        port = random.randrange(20000, 32000)
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)):
                return port


class System:
    """One project, run from a copy of the tree on a path with a space in it."""

    def __init__(self, tree: Path, project: str) -> None:
        self.tree, self.project = tree, project
        self.port, self.manager_port = free_port(), free_port()
        self.flags = ("--project", project, "--port", str(self.port), "--manager-port", str(self.manager_port))
        self.run_dir = tree / "run" / project

    def start(self, *arguments: str) -> subprocess.Popen[str]:
        """Starts ./run.sh in its own session, as a terminal does."""
        # A shell cannot trap what was ignored when it began, and pytest may have been started in the background.
        command = ["env", "--default-signal=INT", str(self.tree / "run.sh"), *self.flags, *arguments]
        return subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
        )

    def up(self, *arguments: str, status: int = 0) -> str:
        process = self.start(*arguments)
        output, _ = process.communicate(timeout=300)
        assert process.returncode == status, output
        return output

    def down(self, *arguments: str) -> str:
        command = [str(self.tree / "stop.sh"), "--project", self.project, *arguments]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def get(self, path: str = "/", port: int | None = None) -> str:
        with urllib.request.urlopen(f"http://127.0.0.1:{port or self.port}{path}", timeout=10) as answer:
            return str(answer.read().decode())

    def answering_backend(self) -> str:
        """The backend that answers a new connection."""
        return self.get().split(" ")[0]

    def status(self) -> dict[str, Any]:
        message: dict[str, Any] = json.loads(self.get("/status", self.manager_port))
        return message

    def active(self) -> list[dict[str, Any]]:
        return [backend for backend in self.status()["backends"] if backend["state"] == "active"]

    def wait_for_active(self, count: int, seconds: float = 40.0) -> list[dict[str, Any]]:
        def all_active() -> list[dict[str, Any]]:
            backends = self.status()["backends"]
            return backends if len(backends) == count and all(b["state"] == "active" for b in backends) else []

        result: list[dict[str, Any]] = wait_until(all_active, f"{count} active backends and no others", seconds)
        return result

    def operate(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        """Sends an operator's order through the Unix socket; returns the answer."""
        with socket.socket(socket.AF_UNIX) as connection:
            connection.connect(str(self.run_dir / "manager.sock"))
            text = json.dumps(body)
            head = f"POST {path} HTTP/1.0\r\nContent-Type: application/json\r\nContent-Length: {len(text)}\r\n\r\n"
            connection.sendall((head + text).encode())
            answer = b"".join(iter(lambda: connection.recv(65536), b"")).decode()
        head, _, payload = answer.partition("\r\n\r\n")
        assert " 200 " in head or " 204 " in head, answer
        return dict(json.loads(payload)) if payload else {}

    def serves(self) -> bool:
        """Whether the sample server answers a new connection."""
        try:
            return "primes" in self.get()
        except OSError:
            return False

    def manager_pid(self) -> int:
        return int((self.run_dir / "manager.pid").read_text())

    def kill_manager(self) -> None:
        """Kills the manager and waits until its supervisor has started another one that answers."""
        killed = self.manager_pid()
        os.kill(killed, signal.SIGKILL)

        def answers() -> bool:
            try:
                return self.manager_pid() != killed and bool(self.status())
            except OSError:
                return False

        wait_until(answers, "the manager is back", 20)

    def log(self) -> str:
        return (self.run_dir / "manager.log").read_text()

    def containers(self) -> list[str]:
        return docker("ps", "-aq", "--filter", f"label=lbscaler.project={self.project}").split()

    def nothing_left(self) -> bool:
        networks = docker("network", "ls", "-q", "--filter", f"label=lbscaler.project={self.project}")
        return not self.containers() and not networks and not self.manager_alive()

    def manager_alive(self) -> bool:
        for command in Path("/proc").glob("[0-9]*/cmdline"):
            try:
                words, cwd = command.read_bytes(), (command.parent / "environ").read_bytes()
            except OSError:
                continue
            if b"manager/script.py" in words and f"LB_PROJECT={self.project}\0".encode() in cwd:
                return True
        return False


def rotations(system: System) -> list[tuple[float, set[str]]]:
    """(seconds since 1970, addresses) of each rotation in the balancer's log."""
    found = []
    for line in docker("logs", f"{system.project}-balancer").splitlines():
        if match := re.match(r"(\S+ \S+) INFO rotation (.*)", line):
            at = datetime.strptime(match[1], "%Y-%m-%d %H:%M:%S,%f").replace(tzinfo=UTC)
            found.append((at.timestamp(), set(match[2].split())))
    return found


class Load:
    """hey, from Debian's packages, at 127.0.0.1: new connections at a bounded rate for a bounded time.

    The workers of one hey send at the same moment, so several are started a little apart for an even load. A test that
    waits for an event gives more seconds than it needs, and ends the load with `stop`.
    """

    LANES = 8

    def __init__(self, port: int, seconds: int, per_second: int, timeout: int = 30) -> None:
        workers = 5
        command = ["hey", "-z", f"{seconds}s", "-c", str(workers), "-q", str(per_second / self.LANES / workers)]
        command += ["-t", str(timeout), "-disable-keepalive", f"http://127.0.0.1:{port}/"]
        self._lanes = []
        for _ in range(self.LANES):
            self._lanes.append(loads.begin(command))
            time.sleep(workers / per_second)

    def running(self) -> bool:
        return any(lane.poll() is None for lane in self._lanes)

    def stop(self) -> tuple[int, int, float]:
        """Ends the load after the requests in progress; the result."""
        for lane in self._lanes:
            lane.send_signal(signal.SIGINT)
        return self.result()

    def result(self) -> tuple[int, int, float]:
        """(answers with status 200, all other outcomes, slowest answer in seconds)."""
        outputs = [lane.communicate(timeout=120)[0] for lane in self._lanes]
        answered = others = 0
        slowest = 0.0
        for output in outputs:
            answered += sum(int(n) for n in re.findall(r"\[200\]\s+(\d+) responses", output))
            others += sum(int(n) for n in re.findall(r"\[(?!200\])\d{3}\]\s+(\d+) responses", output))
            errors = output.partition("Error distribution:")[2]
            others += sum(int(n) for n in re.findall(r"^\s+\[(\d+)\]", errors, re.MULTILINE))
            slowest = max([slowest, *(float(s) for s in re.findall(r"Slowest:\s+([\d.]+)", output))])
        assert answered, outputs[0]
        return answered, others, slowest


@contextmanager
def machine_lock(name: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Lets one test process in at a time; yields a folder that all processes of this run share. With tests/run.sh, its
    runs of pytest share one, too."""
    place = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        place = place.parent
    place = Path(os.environ.get("LBTEST_SHARED") or place)
    with (place / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield place


@pytest.fixture(scope="session")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy under a path with a space. The first process makes the images and the environment for all of them."""
    place = copy_tree(tmp_path_factory.mktemp("e2e") / "a checkout")
    with machine_lock("images", tmp_path_factory) as common:
        made = common / "venv"
        if made.is_dir():
            shutil.copytree(made, place / ".venv", symlinks=True)
        else:
            first = System(place, "lbtestimages")
            first.up("1", "--min", "1")
            first.down("--now")
            shutil.copytree(place / ".venv", made, symlinks=True)
    return place


@pytest.fixture(scope="module")
def shared(tree: Path) -> Iterator[System]:
    """A system that a module's tests use; each must leave it running with two backends."""
    system = System(tree, f"lbtest{os.getpid()}")
    system.up("2", *FAST, "--max", "8")
    yield system
    system.down("--now")


@pytest.fixture
def system(shared: System) -> System:
    shared.operate("/scale", {"min": 2, "max": 8, "target": 100})
    shared.wait_for_active(2, 60)
    return shared


@pytest.fixture(scope="module")
def three(tree: Path) -> Iterator[System]:
    """Three backends, with a target that no load reaches, for one module's tests."""
    system = System(tree, f"lbthree{os.getpid()}")
    system.up("3", *FAST, "--min", "3", "--max", "8", "--target", "100000")
    yield system
    system.down("--now")


@pytest.fixture
def fresh(tree: Path) -> Iterator[System]:
    """A project that is not started yet; it is stopped after the test."""
    system = System(tree, f"lbfresh{os.getpid()}")
    yield system
    if not system.nothing_left():
        system.down("--now")
