"""A host of the campaign's own: a network namespace with its own engine, and another namespace for clients outside.

The faults change this host's firewall, settings, connection table and engine, so it must not be the machine's own.
Addresses are of 198.18.0.0/15, which is reserved for tests; neither namespace has a way out. `Site.close` ends every
process that the site started, by pid.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from checkout import ROOT, copy_tree

HOST, OUTSIDE = "198.18.0.1", "198.18.0.2"
FLOOD_SOURCES = "198.18.8.0/24"  # of SYNs without a client; routed to the outside, where nobody has them
DISK = "64m"  # of run/, so that it can be filled
LOGGED = 3000  # characters of a program's output in an error


class SiteError(Exception):
    """A program failed; the message has its output."""


def wait_for(condition: Callable[[], Any], what: str, seconds: float = 60.0, pause: float = 0.2) -> Any:
    """The first true value of `condition`."""
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        if time.monotonic() > deadline:
            raise SiteError(f"not within {seconds:g} s: {what}")
        time.sleep(pause)
    return value


def call(*command: str, text: str | None = None, env: dict[str, str] | None = None, timeout: float = 300) -> str:
    done = subprocess.run(
        command, input=text, env=env, capture_output=True, text=True, timeout=timeout, check=False
    )  # fmt: skip
    if done.returncode:
        output = (done.stdout + done.stderr)[-LOGGED:]
        raise SiteError(f"{' '.join(command)[:300]}: status {done.returncode}: {output}")
    return done.stdout.strip()


def copy_images(images: list[str], load: list[str], env: dict[str, str]) -> None:
    """From the machine's engine to another one; `load` is its command."""
    save = subprocess.Popen(["docker", "save", *images], stdout=subprocess.PIPE)
    loaded = subprocess.run(load, stdin=save.stdout, env=env, capture_output=True, check=False)
    if save.wait() or loaded.returncode:
        raise SiteError(f"images were not copied: {loaded.stderr.decode()}")


class Site:
    """Opens with `open`; `place` is an empty folder with a short path, because a socket's path has 107 characters."""

    def __init__(self, place: Path) -> None:
        self.place, self.tree = place, place / "a checkout"
        self.host, self.outside = f"lbch{os.getpid()}", f"lbco{os.getpid()}"
        self.socket = place / "docker.sock"
        self.env = {**os.environ, "DOCKER_HOST": f"unix://{self.socket}"}
        self._engine: subprocess.Popen[bytes] | None = None

    # -- programs -----------------------------------------------------------------------------------------------------

    def on_host(self, *command: str) -> list[str]:
        """The command that runs `command` in the host's network."""
        return ["nsenter", f"--net=/run/netns/{self.host}", *command]

    def on_outside(self, *command: str) -> list[str]:
        return ["nsenter", f"--net=/run/netns/{self.outside}", *command]

    def run(self, *command: str, text: str | None = None, timeout: float = 300) -> str:
        return call(*self.on_host(*command), text=text, env=self.env, timeout=timeout)

    def docker(self, *arguments: str, text: str | None = None) -> str:
        return self.run("docker", *arguments, text=text)

    def try_docker(self, *arguments: str) -> str:
        """The same, empty where the engine refuses or does not answer."""
        with suppress(SiteError, subprocess.TimeoutExpired):
            return self.run("docker", *arguments, timeout=20)
        return ""

    def pid_of(self, container: str) -> int:
        return int(self.docker("inspect", "-f", "{{.State.Pid}}", container))

    def inside(self, container: str, *command: str) -> str:
        """Runs a program of this machine in a container's network."""
        return call("nsenter", f"--net=/proc/{self.pid_of(container)}/ns/net", *command)

    # -- the host -----------------------------------------------------------------------------------------------------

    def open(self, images: list[str]) -> None:
        """`images` are copied from the machine's engine."""
        self._connect()
        self.start_engine()
        copy_images(images, self.on_host("docker", "load"), self.env)
        self._copy_tree()

    def _connect(self) -> None:
        for name in (self.host, self.outside):
            call("ip", "netns", "add", name)
            call("ip", "-n", name, "link", "set", "lo", "up")
        link = ["link", "add", "eth0", "netns", self.host, "type", "veth", "peer", "name", "eth0"]
        call("ip", *link, "netns", self.outside)
        for name, address in ((self.host, HOST), (self.outside, OUTSIDE)):
            call("ip", "-n", name, "addr", "add", f"{address}/24", "dev", "eth0")
            call("ip", "-n", name, "link", "set", "eth0", "up")
        call("ip", "-n", self.outside, "route", "add", "198.18.0.0/15", "via", HOST)
        call("ip", "-n", self.host, "route", "add", FLOOD_SOURCES, "via", OUTSIDE)
        # Otherwise the outside would send the answers back to the host, and each would go round until its TTL ends.
        call("ip", "-n", self.outside, "route", "add", "blackhole", FLOOD_SOURCES)

    def _copy_tree(self) -> None:
        """The files that git knows, and .venv. run/ is a small file system of its own."""
        copy_tree(self.tree)
        shutil.copytree(ROOT / ".venv", self.tree / ".venv", symlinks=True)
        (self.tree / "run").mkdir()
        call("mount", "-t", "tmpfs", "-o", f"size={DISK}", "lbchaos", str(self.tree / "run"))

    # -- its engine ---------------------------------------------------------------------------------------------------

    def start_engine(self, *flags: str) -> None:
        """Starts dockerd; tries again, because one that was killed may still hold what the next one needs."""
        command = self.on_host(
            "dockerd", "--host", f"unix://{self.socket}", "--data-root", str(self.place / "data"),
            "--exec-root", str(self.place / "exec"), "--pidfile", str(self.place / "dockerd.pid"), *flags,
        )  # fmt: skip
        for pause in (1, 2, 4):
            with (self.place / "dockerd.log").open("ab") as log:
                self._engine = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
            with suppress(SiteError):
                wait_for(self._engine_started, "the engine answers", 40)
                return
            self._engine.kill()
            self._engine.wait()
            time.sleep(pause)
        raise SiteError(f"the engine does not start: {(self.place / 'dockerd.log').read_text()[-LOGGED:]}")

    def _engine_started(self) -> bool:
        if self._engine is None or self._engine.poll() is not None:
            raise SiteError("the engine has ended")
        return bool(self.try_docker("info", "-f", "{{.ID}}"))

    def end_engine(self, how: signal.Signals) -> None:
        if self._engine is not None:
            self._engine.send_signal(how)
            self._engine.wait(60)
            self._engine = None

    def close(self) -> None:
        """Kills everything and removes the site. An orderly end would only take time."""
        containers = self._containers()
        self.end_engine(signal.SIGKILL)
        for pid in self._processes(containers):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self._unmount()
        for name in (self.host, self.outside):
            subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False)
        for id_ in containers:  # the control groups, which the engine did not remove
            for pattern in (f"docker/{id_}", f"*/docker/{id_}"):
                for group in Path("/sys/fs/cgroup").glob(pattern):
                    with suppress(OSError):
                        group.rmdir()
        shutil.rmtree(self.place, ignore_errors=True)

    def _unmount(self) -> None:
        for _ in range(3):
            mounted = [line.split()[1] for line in Path("/proc/mounts").read_text().splitlines()]
            for target in reversed(mounted):
                if target.startswith(f"{self.place}/"):
                    path = target.replace("\\040", " ")
                    subprocess.run(["umount", "-l", path], capture_output=True, check=False)

    def _containers(self) -> list[str]:
        """Their ids, from the engine's files."""
        place = self.place / "data" / "containers"
        return [entry.name for entry in place.iterdir()] if place.is_dir() else []

    def _processes(self, containers: list[str]) -> list[int]:
        """What was started here: containerd, containers, the manager with its supervisor."""
        found = []
        for process in Path("/proc").glob("[0-9]*"):
            with suppress(OSError):  # it has ended
                words = (process / "cmdline").read_bytes().decode(errors="replace")
                groups = (process / "cgroup").read_text()
                cwd = str((process / "cwd").readlink())
                in_container = any(f"/docker/{id_}" in groups for id_ in containers)
                of_site = f"{self.place}/" in words or cwd.startswith(f"{self.place}/")
                if (in_container or of_site) and int(process.name) != os.getpid():
                    found.append(int(process.name))
        return found
