"""One project on this host: the labels of what it owns in Docker, its files and its processes.

Everything is found by labels and command lines, so it is found even if files were deleted.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Mapping
from functools import cached_property, partial
from http import HTTPStatus
from pathlib import Path
from typing import Any

import docker
import docker.errors

from cli import unit
from cli.output import Failed, Output, Undo
from cli.processes import MANAGER, SUPERVISOR, end, find
from core.settings import ROOT

ENGINE_TIMEOUT = 600  # seconds without a byte from the engine: a build may print nothing for minutes


class Project:
    def __init__(self, name: str, output: Output) -> None:
        self.name, self.output = name, output
        self.run_dir = ROOT / "run" / name
        self.certificate_files: dict[str, str] = {}  # by name: what `write_secrets` will write into `run_dir`

    # -- Docker -------------------------------------------------------------------------------------------------------

    @cached_property
    def docker(self) -> docker.DockerClient:
        try:
            return docker.from_env(timeout=ENGINE_TIMEOUT)
        except docker.errors.DockerException as error:
            raise Failed(f"no Docker Engine answers: {error}") from error

    def labels(self, role: str) -> dict[str, str]:
        return {"lbscaler.project": self.name, "lbscaler.role": role}

    def filter(self, role: str = "") -> dict[str, list[str]]:
        """A filter of the Engine API for everything that this project owns, in one role or in all."""
        labels = [f"lbscaler.project={self.name}"]
        if role:
            labels.append(f"lbscaler.role={role}")
        return {"label": labels}

    def containers(self, role: str = "") -> list[Any]:
        found: list[Any] = self.docker.containers.list(all=True, filters=self.filter(role), ignore_removed=True)
        return found

    def services(self, role: str = "") -> list[Any]:
        found: list[Any] = self.docker.services.list(filters=self.filter(role)) if self.is_swarm_manager() else []
        return found

    def network(self) -> Any | None:
        """This project's network."""
        found = self.docker.networks.list(filters=self.filter("network"))
        return found[0] if found else None

    def swarm_node(self) -> Mapping[str, Any]:
        """The part of `docker info` about this host as a node of a Swarm."""
        node: Mapping[str, Any] = self.docker.info()["Swarm"]
        return node

    def is_swarm_manager(self) -> bool:
        node = self.swarm_node()
        return bool(node["LocalNodeState"] == "active" and node["ControlAvailable"])

    def remove_checks(self) -> None:
        """Removes the containers of kernel checks. A run.sh that was killed may have left some."""
        for container in self.containers("check"):
            remove_container(container)

    # -- files --------------------------------------------------------------------------------------------------------

    @property
    def secrets_dir(self) -> Path:
        return self.run_dir / "secrets"

    def make_token(self) -> None:
        path = self.run_dir / "token"
        if not has_text(path):
            write(path, secrets.token_hex(24))

    @cached_property
    def token(self) -> str:
        """The token in the file, which is made if there is none. After `rotate_token`: what `write_secrets` will
        write."""
        self.make_token()
        return (self.run_dir / "token").read_text().strip()

    def rotate_token(self) -> None:
        self.token = secrets.token_hex(24)

    def write_secrets(self) -> None:
        """Writes the certificate of a Swarm, and the token for the manager and, as a copy, for the balancer. The
        balancer runs without CAP_DAC_OVERRIDE, so it cannot read another user's file of mode 0600: its copy is readable
        for all, in a folder that only this user may enter."""
        for name, text in {**self.certificate_files, "token": self.token}.items():
            write(self.run_dir / name, text)
        self.secrets_dir.mkdir(mode=0o700, exist_ok=True)
        folder = self.secrets_dir / "balancer"
        folder.mkdir(exist_ok=True)
        folder.chmod(0o755)
        write(folder / "token", self.token)
        (folder / "token").chmod(0o644)

    # -- the manager and its supervisor -------------------------------------------------------------------------------

    def end_manager(self) -> None:
        """Ends the supervisor first, so that it does not start the manager again."""
        # Through systemd if possible: it would start a supervisor that was killed again.
        unit.stop(self.name)
        for program in (SUPERVISOR, MANAGER):
            for pid in find(self.name, program):
                end(pid)

    def manager_runs(self) -> bool:
        return any(find(self.name, MANAGER))

    def supervisor_runs(self) -> bool:
        return any(find(self.name, SUPERVISOR))


def has_text(path: Path) -> bool:
    return path.exists() and path.stat().st_size > 0


def remove_container(container: Any) -> None:
    """Removes it, unless the engine is at that already."""
    try:
        container.remove(force=True, v=True)
    except docker.errors.APIError as error:
        if error.status_code not in (HTTPStatus.NOT_FOUND, HTTPStatus.CONFLICT):
            raise


def keep(path: Path, undo: Undo) -> None:
    """Registers that the file gets its present content again, or is removed if there is none."""
    if not path.exists():
        undo.add(f"remove {path.name}", partial(path.unlink, missing_ok=True))
        return
    undo.add(f"restore {path.name}", partial(_restore, path, path.read_bytes(), path.stat().st_mode))


def _restore(path: Path, content: bytes, mode: int) -> None:
    write(path, content)
    path.chmod(mode)


def write(path: Path, content: str | bytes) -> None:
    """Replaces the file, mode 0600, in one step: a reader gets the old content or the new one. Raises Failed."""
    fresh = path.with_name(f"{path.name}.new")
    try:
        fresh.unlink(missing_ok=True)
        # The content is on the disk before the file gets its name, so a crash of the host leaves no empty file.
        with os.fdopen(os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        fresh.replace(path)
    except OSError as error:
        raise Failed(f"cannot write {os.path.relpath(path, ROOT)}: {error.strerror}") from error
