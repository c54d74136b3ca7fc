"""A copy of the tree in which run.sh and stop.sh run whole, with fakes for the engine, its client program, iptables,
systemd, venv and the manager. The fake programs come first on PATH, so that only processes and files of this host are
touched.

The fake engine (fakes_engine) runs in the tests' process. The fake programs and the fake manager share files with it in
`System.state`. The fake manager answers /status by the image that it was started with: see MANAGER.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fakes_engine import FakeEngine

ROOT = Path(__file__).parents[1]

# Docker's client program: what the checks of the host run. The check of the kernel can be made to hang.
DOCKER = r"""#!/bin/bash
case "$*" in
    "info --format"*) echo '{"ServerVersion": "20.10"}' ;;
    info | "ps "*) ;;
    "network inspect "*) echo '[]'; exit 1 ;;
    "run --rm "*check)
        echo "$*" >>"$FAKE_STATE/kernel_checks"
        if [ -e "$FAKE_STATE/late_check" ]; then # the engine creates the container a second after the call
            setsid sh -c 'sleep 1; touch "$FAKE_STATE/check"' &
            sleep 2
            rm "$FAKE_STATE/check"
        elif [ -e "$FAKE_STATE/slow_check" ]; then touch "$FAKE_STATE/check"; exec sleep 60; fi ;;
    *) exit 1 ;;
esac
"""

PYTHON3 = r"""#!/bin/bash
# Makes an environment without a download: its python is the tests' own.
if [ "$1 $2" = "-m venv" ]; then
    mkdir -p "$3/bin" && cp "$FAKE_STATE/venv-python" "$3/bin/python"
else
    exec "PYTHON" "$@"
fi
"""

VENV_PYTHON = r"""#!/bin/bash
if [ "$1 $2" = "-m pip" ]; then exit "$(cat "$FAKE_STATE/pip_status" 2>/dev/null || echo 0)"; fi
exec "PYTHON" "$@"
"""

MANAGER = r'''"""Two backends in rotation. By the image: good; bad: an update to it is given up after half a second, or
at once if refused_update.json exists; never: no backend gets ready; broken: the balancer cannot be started; hung:
nothing happens."""
import http.server, json, os, signal, sys, threading, time

from core.snapshot import with_problems

image, began = os.environ["LB_IMAGE"], time.monotonic()
name = os.path.join(os.environ["FAKE_STATE"], f"id-of-{image}")
if os.path.exists(name):
    image = open(name).read()
refused = os.path.exists(f"run/{os.environ['LB_PROJECT']}/balancer/refused_update.json")

def status():
    launches = {"failed": 0, "why": "", "updating": False, "update_given_up": "", "replaced": 2, "to_replace": 0}
    balancer = {"state": "running", "problem": ""}
    states = ["active", "active"]
    if "bad" in image and not refused and time.monotonic() - began < 0.5:
        launches |= {"updating": True, "replaced": 0, "to_replace": 2}
    elif "bad" in image:
        launches |= {"update_given_up": "its container ended with exit code 3"}
    elif "never" in image:
        launches |= {"failed": 4, "why": "its container ended with exit code 3; last log line: no such luck"}
        states = []
    elif "hung" in image:
        states = ["starting", "starting"]
    elif "broken" in image:
        balancer = {"state": "failed", "problem": "port is already allocated"}
    row = {"node": "", "share": 0.5, "connections_rate": 0, "packets_rate": 0, "active": 0, "why": "", "reason": ""}
    backends = [
        {"name": f"p-{n}", "ip": "198.18.0.9", "state": state, "healthy": state == "active", **row}
        for n, state in enumerate(states)
    ]
    return with_problems({
        "project": os.environ["LB_PROJECT"], "image": image, "pid": os.getpid(), "desired": 2, "current": 2, "min": 2,
        "max": 10, "metric": "packets", "rate": None, "target": 100.0, "paused": False, "engine": "ok",
        "revision": "a", "launches": launches, "balancer": balancer, "backends": backends, "last_decision": None,
        "balancers": [{"id": "b", "last_seen": 0.1, "revision": "a"}], "settings": {"interval": 2.0},
        "environment": {name: value for name, value in os.environ.items() if name.startswith("LB_")},
        "arguments": sys.argv[1:], "data_path": {"working": True, "problem": ""},
    })

class Answer(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
        self.wfile.write(json.dumps(status()).encode())

    def log_message(self, *_):
        pass

signal.signal(signal.SIGTERM, lambda *_: os._exit(0))
if os.path.exists(backends := f"run/{os.environ['LB_PROJECT']}/backends"):
    os.unlink(backends)
for port in (os.environ["LB_MANAGER_PORT"], os.environ["LB_PORT"]):
    server = http.server.ThreadingHTTPServer(("127.0.0.1", int(port)), Answer)
    threading.Thread(target=server.serve_forever, daemon=True).start()
open(os.environ["FAKE_STATE"] + "/balancer", "w").close()
while True:
    signal.pause()
'''

NOTHING = "#!/bin/sh\nexit 0\n"  # a program without an effect
# Lists its calls; `start` runs the unit's program in the unit's directory, as systemd does.
SYSTEMCTL = r"""#!/bin/bash
echo "$*" >>"$FAKE_STATE/systemctl"
unit=$(ls "$FAKE_STATE/boot/$2" "$FAKE_STATE/runtime/$2" 2>/dev/null | head -n 1)
if [ "$1" = enable ] && [ -e "$FAKE_STATE/enable_fails" ]; then exit 1; fi
if [ "$1" = start ]; then
    cd "$(sed -n 's/^WorkingDirectory=//p' "$unit")"
    setsid $(sed -n 's/^ExecStart=//p' "$unit") >/dev/null 2>&1 &
fi
"""


def until(condition: Callable[[], Any], what: str, seconds: float = 20.0) -> Any:
    """The first true value of `condition`; a generous bound, for a busy machine."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if value := condition():
            return value
        time.sleep(0.02)
    raise AssertionError(f"not within {seconds:g} s: {what}")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class System:
    """One project, p by default, in a tree on a path with a space in it."""

    def __init__(self, place: Path, project: str = "p", systemd: bool = False) -> None:
        self.tree, self.state, self.project = place / "a tree", place / "state", project
        self.run_dir = self.tree / "run" / project
        self.port, self.manager_port = free_port(), free_port()
        self.engine = FakeEngine(self.state)
        fakes = place / "bin"
        for folder in (self.tree, self.state, fakes):
            folder.mkdir(parents=True)
        for name in ("run.sh", "stop.sh"):
            shutil.copy(ROOT / name, self.tree)
        for name in ("manager", "balancer", "server"):
            ignored = shutil.ignore_patterns("__pycache__", "ip.txt", "hostip.txt")
            shutil.copytree(ROOT / name, self.tree / name, ignore=ignored)
        (self.tree / "manager" / "script.py").write_text(MANAGER)
        # Units go into folders of the tests; systemd is there if the first one exists.
        self.runtime, self.boot = self.state / "runtime", self.state / "boot"
        unit = self.tree / "manager" / "cli" / "unit.py"
        text = unit.read_text().replace('"/run/systemd/system"', repr(str(self.runtime)))
        unit.write_text(text.replace('"/etc/systemd/system"', repr(str(self.boot))))
        for folder in (self.runtime, self.boot) if systemd else ():
            folder.mkdir()
        (self.state / "venv-python").write_text(VENV_PYTHON.replace("PYTHON", sys.executable))
        (self.state / "venv-python").chmod(0o755)
        programs = {
            "docker": DOCKER,
            "python3": PYTHON3.replace("PYTHON", sys.executable),
            "systemctl": SYSTEMCTL,
            **dict.fromkeys(("iptables", "iptables-save"), NOTHING),
        }
        for name, text in programs.items():
            (fakes / name).write_text(text)
            (fakes / name).chmod(0o755)
        inherited = {name: value for name, value in os.environ.items() if not name.startswith(("LB_", "DOCKER_"))}
        self.environment = {
            **inherited,
            "PATH": f"{fakes}:{os.environ['PATH']}",
            "FAKE_STATE": str(self.state),
            "DOCKER_HOST": f"unix://{self.engine.socket}",
        }

    def command(self, script: str, *arguments: str) -> list[str]:
        # A shell cannot trap what was ignored when it began, and the tests may have been started in the background.
        command = ["env", "--default-signal=INT,HUP,PIPE,TERM", str(self.tree / script), "--project", self.project]
        ports = ["--port", str(self.port), "--manager-port", str(self.manager_port)]
        return [*command, *(ports if script == "run.sh" else []), *arguments]

    def start(self, *arguments: str) -> subprocess.Popen[str]:
        """Begins ./run.sh in a session of its own, as a terminal would."""
        pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        return subprocess.Popen(
            self.command("run.sh", *arguments), env=self.environment, start_new_session=True, **pipes
        )

    def script(self, name: str, *arguments: str, status: int = 0) -> str:
        """Runs it to its end; its output."""
        done = subprocess.run(
            self.command(name, *arguments),
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=60,
            check=False,
        )
        assert done.returncode == status, done.stdout
        return done.stdout

    def up(self, *arguments: str, status: int = 0) -> str:
        return self.script("run.sh", *arguments, status=status)

    def down(self, *arguments: str, status: int = 0) -> str:
        return self.script("stop.sh", *arguments, status=status)

    def processes(self) -> list[int]:
        """Managers and supervisors that run from this tree."""
        found = []
        for file in Path("/proc").glob("[0-9]*/cmdline"):
            try:
                words = file.read_bytes().split(b"\0")
                is_program = words[1:2] and words[1].endswith((b"manager/script.py", b"manager/supervise.sh"))
                if is_program and (file.parent / "cwd").samefile(self.tree):
                    found.append(int(file.parent.name))
            except OSError:
                continue
        return found

    def nothing_left(self) -> bool:
        return not self.processes() and self.engine.is_empty()

    def close(self) -> None:
        for pid in self.processes():
            os.kill(pid, signal.SIGKILL)
        self.engine.close()
