"""The Docker Engine, through its Unix socket (or DOCKER_HOST): it and its twin swarm_engine alone import `docker`.

Every call may take long and may raise EngineError; none touches a container without this project's labels.
"""

from __future__ import annotations

import hashlib
import json
import subprocess
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import closing, contextmanager, suppress
from typing import Any

import docker
import docker.errors
import requests

from core.engine import BalancerState, Engine, EngineError, Event, NameTaken, TakenOver
from core.fleet import Container
from core.settings import Settings
from engines import path_probe
from engines.options import (
    BALANCER_CAPABILITIES,
    BALANCER_MEMORY,
    BALANCER_PIDS,
    BALANCER_SYSCTLS,
    PIDS,
    SYSCTLS,
    BalancerOptions,
    advice,
    options,
)

STOP_GRACE = 10  # seconds between SIGTERM and SIGKILL for a backend that has drained
SERVICE_PORT = 8000  # the balancer's, inside its container
CONFLICT = 409  # HTTP status: among others, that a container's removal is in progress
REMOVAL_TRIES, REMOVAL_PAUSE = 40, 0.1  # seconds

Row = Mapping[str, Any]  # a container in the engine's list


@contextmanager
def engine_errors() -> Iterator[None]:
    try:
        yield
    except docker.errors.APIError as error:
        kind = NameTaken if error.status_code == 409 and "is already in use" in str(error) else EngineError
        raise kind(str(error.explanation or error)) from error
    except (EngineError, TakenOver):
        raise
    except Exception as error:  # the SDK lets through what its own dependencies raise, down to KeyError
        raise EngineError(f"{type(error).__name__}: {error}") from error


class DockerEngine(Engine):
    def __init__(self, settings: Settings, balancer: BalancerOptions) -> None:
        self._settings, self._balancer_options = settings, balancer
        self._labels = {"lbscaler.project": settings.project, "lbscaler.role": "backend"}
        self._filter = {"label": [f"{key}={value}" for key, value in self._labels.items()]}
        self._routed: dict[str, tuple[str, str]] = {}
        self._digest = ""
        self._check_targets: list[tuple[str, int]] = []
        with engine_errors():
            self._client = docker.from_env(timeout=30)

    def check_path(self) -> Mapping[str, str]:
        return path_probe.check(self._check_targets, self.gateway())

    def gateway(self) -> str:
        """The host's address on the backends' network, where the balancer finds the manager."""
        return self._network("Gateway")

    def subnet(self) -> str:
        return self._network("Subnet")

    def _network(self, what: str) -> str:
        with engine_errors():
            return str(self._client.networks.get(self._settings.project).attrs["IPAM"]["Config"][0][what])

    def list(self) -> list[Container]:
        """All our backends, running or not, in one call, which shows the balancer, too."""
        with engine_errors():
            rows = self._rows()
            balancers = [row for row in rows if _role(row) == "balancer"]
            backends = [self._container(row) for row in rows if _role(row) == "backend"]
            self._note_balancers(balancers)
            if self._settings.preserve_client_ip:
                self._route_through([self._container(row) for row in balancers], backends)
        return backends

    def _rows(self) -> Iterable[Row]:
        ours = {"label": f"lbscaler.project={self._settings.project}"}
        rows: Iterable[Row] = self._client.api.containers(all=True, filters=ours)
        return rows

    def _note_balancers(self, rows: Iterable[Row]) -> None:
        running = [row for row in rows if row["State"] == "running" and self._container(row).ip]
        current = [row for row in running if row["Labels"].get("lbscaler.config") == self._balancer_digest()]
        if current:
            self.balancer = BalancerState.RUNNING
        elif running:
            self.balancer = BalancerState.OUTDATED
        else:
            self.balancer = BalancerState.STOPPED if list(rows) else BalancerState.MISSING
        # A container reports by its host name, which is its short id.
        self.balancers = frozenset(row["Id"][:12] for row in running)
        self._check_targets = [(self._container(row).ip, SERVICE_PORT) for row in current]

    def _balancer_spec(self) -> dict[str, Any]:
        """What the balancer is created from: least privilege, and the settings that concern it."""
        settings, given = self._settings, self._balancer_options
        return {
            "image": given.image,
            "ports": {f"{SERVICE_PORT}/tcp": (settings.bind, settings.port)},
            "environment": {
                "LB_TOKEN": given.token,
                "LB_BACKEND_PORT": str(settings.backend_port),
                "LB_BACKEND_SUBNET": self.subnet() if settings.preserve_client_ip else "",
            },
            "volumes": [f"{settings.run_dir / 'balancer'}:/balancer/run:ro"],
            "restart_policy": {"Name": "always"},
            "cap_drop": ["ALL"],
            "cap_add": BALANCER_CAPABILITIES,
            "security_opt": ["no-new-privileges"],
            "read_only": True,
            "tmpfs": {"/run": ""},
            "sysctls": BALANCER_SYSCTLS,
            "mem_limit": BALANCER_MEMORY,
            "pids_limit": BALANCER_PIDS,
        }

    def _balancer_digest(self) -> str:
        if not self._digest:
            made_from = {**self._balancer_spec(), "manager": self._balancer_options.manager}
            self._digest = hashlib.sha256(json.dumps(made_from, sort_keys=True).encode()).hexdigest()[:12]
        return self._digest

    def repair_balancer(self) -> None:
        """Replaces whatever balancer there is by one that runs as the settings want it; a paused one goes on."""
        with engine_errors():
            for row in self._rows():
                if _role(row) != "balancer":
                    continue
                if row["State"] == "paused" and row["Labels"].get("lbscaler.config") == self._balancer_digest():
                    self._client.api.unpause(row["Id"])
                    return
                self._remove_balancer(row)
            labels = {**self._labels, "lbscaler.role": "balancer", "lbscaler.config": self._balancer_digest()}
            container = self._client.containers.create(
                name=f"{self._settings.project}-balancer",
                network=self._settings.project,
                labels=labels,
                **self._balancer_spec(),
            )
            self._start(container)

    def _remove_balancer(self, row: Row) -> None:
        """Removes it, or waits until somebody else has: its name is free only then."""
        for _ in range(REMOVAL_TRIES):
            try:
                self._client.api.remove_container(row["Id"], v=True, force=True)
            except docker.errors.NotFound:
                return
            except docker.errors.APIError as error:
                if error.status_code != CONFLICT:
                    raise
                time.sleep(REMOVAL_PAUSE)

    def _start(self, container: Any) -> None:
        """Starts a new container, and removes it where it does not start."""
        try:
            container.start()
            container.reload()
        except Exception:
            with suppress(docker.errors.APIError, requests.RequestException):
                container.remove(force=True, v=True)
            raise

    def _route_through(self, balancers: Iterable[Container], backends: Iterable[Container]) -> None:
        """Points the backends' default route at the balancer, from outside: they keep no capability to do it."""
        backends = list(backends)
        listed = {backend.id for backend in backends}
        self._routed = {id_: route for id_, route in self._routed.items() if id_ in listed}
        for balancer in balancers:
            for backend in backends:
                wanted = (backend.id, balancer.ip)
                if backend.status != "running" or not balancer.ip or self._routed.get(backend.id) == wanted:
                    continue
                try:
                    pid = self._client.api.inspect_container(backend.id)["State"]["Pid"]
                except docker.errors.NotFound:
                    continue  # gone since it was listed
                if not pid:
                    continue  # it has ended since it was listed
                enter = f"nsenter --net=/proc/{pid}/ns/net ip route replace default via"
                command = [*enter.split(), balancer.ip]
                done = subprocess.run(command, capture_output=True, text=True, check=False)
                if done.returncode:
                    raise EngineError(f"route of {backend.name} through the balancer: {done.stderr.strip()}")
                self._routed[backend.id] = wanted

    def _container(self, row: Row) -> Container:
        ip = row["NetworkSettings"]["Networks"].get(self._settings.project, {}).get("IPAddress", "")
        name = str(row["Names"][0]).lstrip("/")
        spec = row["Labels"].get("lbscaler.spec") or row["ImageID"]
        exit_code = self._exit_code(str(row["Id"])) if row["State"] in ("exited", "dead") else None
        return Container(str(row["Id"]), name, ip, str(row["State"]), exit_code, spec=str(spec))

    def _exit_code(self, container_id: str) -> int | None:
        """The list does not have it. None where the container is gone since."""
        with suppress(docker.errors.NotFound):
            return int(self._client.api.inspect_container(container_id)["State"]["ExitCode"])
        return None

    def spec(self) -> str:
        """What new backends are to be made from, in full: the image's id and every option, as a text. It is kept as a
        label, so that an update can go back to what the backends before it were made from."""
        with engine_errors():
            image = self._client.api.inspect_image(self._settings.image)
        return json.dumps({"image": image["Id"], **options(self._settings, str(image["Config"].get("User") or ""))})

    def launch(self, name: str, spec: str) -> Container:
        """Creates and starts a backend from `spec`. Raises NameTaken when a foreign container has the name."""
        labels = {**self._labels, "lbscaler.spec": spec}
        with engine_errors():
            container = self._client.containers.create(
                name=name,
                hostname=name,
                labels=labels,
                network=self._settings.project,
                pids_limit=PIDS,
                sysctls=SYSCTLS,
                healthcheck={"test": ["NONE"]},  # the balancer probes; this engine would do nothing with the result
                **json.loads(spec),
            )
            self._start(container)
        networks = container.attrs["NetworkSettings"]["Networks"]
        ip = networks[self._settings.project]["IPAddress"]
        return Container(container.id, name, ip, container.status, spec=spec)

    def stop(self, container_id: str) -> None:
        """SIGTERM, SIGKILL after STOP_GRACE, and away with it; fine when it is gone already."""
        with engine_errors(), suppress(docker.errors.NotFound):
            container = self._client.containers.get(container_id)
            container.stop(timeout=STOP_GRACE)
            container.remove(force=True, v=True)

    def last_log_line(self, container_id: str) -> str:
        """The last line of its log, and in brackets the setting that might help."""
        with engine_errors():
            container = self._client.containers.get(container_id)
            text = container.logs(tail=20).decode(errors="replace").strip()
            state = container.attrs["State"]
        line = text.splitlines()[-1].strip() if text else "none"
        exit_code = None if state.get("Running") else int(state.get("ExitCode", 0))
        hint = advice(text, exit_code, bool(state.get("OOMKilled")))
        return f"{line} [{hint}]" if hint else line

    def events(self) -> Iterator[Event]:
        """What happens to our containers from now on; ends or raises EngineError when the engine does."""
        with engine_errors():
            wanted = ["die", "kill", "pause", "oom", "destroy", "disconnect"]
            filters = {"type": ["container", "network"], "event": wanted}
            with (
                closing(docker.from_env(timeout=None)) as client,
                closing(client.events(decode=True, filters=filters)) as stream,
            ):
                for event in stream:
                    attributes = event["Actor"]["Attributes"]
                    code = attributes.get("exitCode" if event["Action"] == "die" else "signal", "0")
                    yield Event(event["Action"], event["Actor"]["ID"], int(code) if code.isdecimal() else 0)


def _role(row: Row) -> str:
    return str(row["Labels"].get("lbscaler.role", ""))
