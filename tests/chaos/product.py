"""The project under test, on the site's host: started, changed and asked with its own commands, as its users do."""

from __future__ import annotations

import http.client
import json
import signal
import socket
import subprocess
from contextlib import suppress
from pathlib import Path
from typing import Any

from chaos.site import HOST, Site, wait_for

PROJECT, PORT, MANAGER_PORT = "lbchaos", 8000, 5000
BALANCER = f"{PROJECT}-balancer"
BACKENDS, MOST = 4, 8
ORDER_TIMEOUT = 10.0  # seconds
FAST = ("--interval", "1", "--panic-window", "3", "--stable-window", "10", "--drain-timeout", "8")
# No load reaches this target, so only faults and the operator's settings change the number of backends.
FIXED = ("--metric", "connections", "--target", "100000")


class Product:
    def __init__(self, site: Site, datapath: str, image: str, *flags: str) -> None:
        self.site, self.datapath = site, datapath
        self.run_dir = site.tree / "run" / PROJECT
        self.flags = ("--project", PROJECT, "--datapath", datapath, "--image", image, "--health", "http:/ok")
        self.flags += ("--min", str(BACKENDS), "--max", str(MOST), "--memory", "128m", *FAST, *(flags or FIXED))

    # -- commands -----------------------------------------------------------------------------------------------------

    def up(self, *flags: str) -> str:
        return self.site.run(str(self.site.tree / "run.sh"), *self.flags, *flags)

    def begin_up(self, *flags: str) -> subprocess.Popen[bytes]:
        command = self.site.on_host(str(self.site.tree / "run.sh"), *self.flags, *flags)
        log = (self.site.place / "run.log").open("ab")
        return subprocess.Popen(command, env=self.site.env, stdout=log, stderr=log)

    def down(self) -> str:
        return self.site.run(str(self.site.tree / "stop.sh"), "--project", PROJECT)

    def order(self, path: str, body: dict[str, Any]) -> None:
        """Sends an operator's order through the manager's Unix socket. A manager that another fault has stopped carries
        it out when it continues."""
        connection = http.client.HTTPConnection("localhost")
        connection.sock = socket.socket(socket.AF_UNIX)
        connection.sock.settimeout(ORDER_TIMEOUT)
        connection.sock.connect(str(self.run_dir / "manager.sock"))
        connection.request("POST", path, json.dumps(body))
        with suppress(TimeoutError):
            connection.getresponse().read()
        connection.close()

    # -- state --------------------------------------------------------------------------------------------------------

    def status(self) -> dict[str, Any]:
        """The body of /status; empty where the manager does not answer."""
        text = ""
        with suppress(OSError, subprocess.TimeoutExpired):
            command = self.site.on_host("curl", "-s", "-m", "4", f"http://127.0.0.1:{MANAGER_PORT}/status")
            text = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False).stdout
        return dict(json.loads(text)) if text.startswith("{") else {}

    def serves(self) -> bool:
        """Whether a client outside is answered, without a SYN that has to be sent again."""
        command = self.site.on_outside("curl", "-sf", "-o", "/dev/null", "-m", "0.9", f"http://{HOST}:{PORT}/")
        return not subprocess.run(command, check=False).returncode

    def rules_namespace(self) -> list[str]:
        """The start of a command that runs where the rules are."""
        if self.datapath == "host":
            return self.site.on_host()
        return ["nsenter", f"--net=/proc/{self.site.pid_of(BALANCER)}/ns/net"]

    def manager_pids(self) -> list[int]:
        return running("manager/script.py", self.site.tree)

    def supervisor_pids(self) -> list[int]:
        return running("manager/supervise.sh", self.site.tree)

    def client_pids(self) -> list[int]:
        """The balancer's clients; there should be one."""
        return clients_in({self.site.try_docker("inspect", "-f", "{{.Id}}", BALANCER)} - {""})

    def balancer_log(self) -> str:
        """Of the container that runs now."""
        return self.site.run("sh", "-c", f"docker logs {BALANCER} 2>&1")

    def log(self) -> str:
        return (self.run_dir / "manager.log").read_text(errors="replace")

    def logs(self) -> dict[str, str]:
        """The text of each log."""
        return {"manager.log": self.log(), "balancer.log": self.balancer_log()}


def processes() -> list[tuple[int, str]]:
    """(process id, command line) of all processes."""
    found = []
    for place in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            words = (place / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            found.append((int(place.name), words))
    return found


def running(program: str, tree: Path) -> list[int]:
    """The processes of the project's manager or supervisor that run in this checkout."""
    found = []
    for pid, words in processes():
        with suppress(OSError):
            cwd = Path(f"/proc/{pid}/cwd").readlink()
            if program in words and f"--project {PROJECT}" in words and cwd == tree and not is_fork(pid, words):
                found.append(pid)
    return found


def clients_in(containers: set[str]) -> list[int]:
    """The balancers' clients in these containers."""
    programs = [pid for pid, words in processes() if "synchronization_client.py" in words]
    return [pid for pid in programs if any(container in cgroup(pid) for container in containers)]


def is_fork(pid: int, words: str) -> bool:
    """Whether this is a child with the same command line: a program that the process is about to start."""
    parent = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1]
    with suppress(OSError):
        return Path(f"/proc/{parent}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace") == words
    return False


def cgroup(pid: int) -> str:
    with suppress(OSError):
        return Path(f"/proc/{pid}/cgroup").read_text()
    return ""


class Load:
    """The clients outside: a process that sends to one address. `outside` begins a command that runs there."""

    def __init__(self, outside: list[str], address: str, file: Path, *flags: str) -> None:
        self.file = file
        program = str(Path(__file__).with_name("load.py"))
        self.process = subprocess.Popen([*outside, "python3", program, address, str(PORT), str(file), *flags])

    def records(self) -> list[list[Any]]:
        """[kind, start, end, outcome, backend] of each request that has ended."""
        lines = self.file.read_text().splitlines() if self.file.exists() else []
        return [json.loads(line) for line in lines if line.endswith("]")]

    def end(self) -> None:
        """It starts no more requests."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)

    def stop(self) -> list[list[Any]]:
        """Ends the load after the requests in progress."""
        self.end()
        wait_for(lambda: self.process.poll() is not None, "the load ends", 60)
        return self.records()

    def kill(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
