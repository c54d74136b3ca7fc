"""The engine for one host: each backend is a container, and so is the balancer.

Every call may take long and may raise EngineError. None changes a container without this project's labels.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import closing, suppress
from functools import cached_property
from pathlib import Path
from typing import Any

import docker
import docker.errors
import requests

from core.backend_files import environment
from core.engine import BalancerState, Event, NameTaken
from core.fleet import Container
from core.settings import Settings
from engines import options
from engines.base import BaseEngine, engine_errors
from engines.failure_hints import failure_hint, with_hint
from engines.options import BalancerOptions

STOP_GRACE = 10  # seconds between SIGTERM and SIGKILL for a backend that has drained
LOG_LINES = 20  # the end of a failed backend's log, which may show why it failed
# Docker's events after which a backend may no longer serve; "disconnect" is one of its network.
EVENTS = ("die", "kill", "pause", "oom", "destroy", "disconnect")
# HTTP status of the Engine API. For a new container: its name is in use. For a removal: another one is in progress.
CONFLICT = 409
REMOVAL_TRIES, REMOVAL_PAUSE = 40, 0.1  # number, seconds

XTABLES_LOCK = Path("/run/xtables.lock")
HOST_NAME = "lbscaler.hostname"  # label of a balancer whose host name is set

Row = Mapping[str, Any]  # a container in the engine's list


class DockerEngine(BaseEngine):
    def __init__(self, settings: Settings, balancer_options: BalancerOptions) -> None:
        super().__init__(settings, balancer_options)
        self._on_host = settings.datapath == "host"

    def gateway(self) -> str:
        return str(self._network.attrs["IPAM"]["Config"][0]["Gateway"])

    @cached_property
    def _network(self) -> Any:
        with engine_errors():
            return self._client.networks.get(self._settings.project)

    def list(self) -> list[Container]:
        """All backends of the project, running or not. The same call of the API lists the balancer, so its state is
        updated as well."""
        with engine_errors():
            rows = self._rows()
            balancers = [row for row in rows if _role(row) == "balancer"]
            backends = [self._container(row) for row in rows if _role(row) == "backend"]
            self._note_balancers(balancers)
        return backends

    def _rows(self) -> Sequence[Row]:
        label = f"lbscaler.project={self._settings.project}"
        rows: Sequence[Row] = self._client.api.containers(all=True, filters={"label": label})
        return rows

    def _note_balancers(self, rows: Sequence[Row]) -> None:
        """Updates the balancer's state from the list. `rows`: its containers, running or not."""
        running = [row for row in rows if row["State"] == "running" and (self._ip(row) or self._on_host)]
        current = [row for row in running if self._is_current(row)]
        if current:
            self.balancer = BalancerState.RUNNING
        elif running:
            self.balancer = BalancerState.OUTDATED
        else:
            self.balancer = BalancerState.STOPPED if rows else BalancerState.MISSING
        self.balancers = frozenset(_host_name(row) for row in running)
        self._check_targets = [self._check_target(row) for row in current]

    def _check_target(self, balancer: Row) -> tuple[str, int]:
        """The service's address for the test of the data path."""
        if not self._on_host:
            return self._ip(balancer), options.FIRST_PORT
        every_address = self._settings.bind == "0.0.0.0"
        return self.gateway() if every_address else self._settings.bind, self._settings.port

    def _is_current(self, balancer: Row) -> bool:
        return bool(balancer["Labels"].get("lbscaler.config") == self._balancer_digest)

    @cached_property
    def _balancer_digest(self) -> str:
        # A container keeps a mounted folder that was deleted, and does not get the one that run.sh made in its place.
        folder = self._secrets.stat().st_ino if self._secrets.exists() else 0
        return options.config_digest({**self._balancer_spec(), "folder": folder})

    @property
    def _secrets(self) -> Path:
        """The folder with the token for the balancer; the content of the file may change at any time."""
        return self._settings.run_dir / "secrets" / "balancer"

    def _balancer_spec(self) -> dict[str, Any]:
        """The balancer's options, as keyword arguments of the SDK's `containers.create`."""
        files = [f"{self._settings.run_dir / 'balancer'}:/balancer/run:ro", f"{self._secrets}:/run/secrets:ro"]
        specific = self._host_spec(files) if self._on_host else self._bridge_spec(files)
        return {
            "image": self._balancer_options.image,
            **specific,
            "restart_policy": {"Name": "always"},
            "cap_drop": ["ALL"],
            "security_opt": ["no-new-privileges"],
            "read_only": True,
            "tmpfs": {"/run": ""},
            "mem_limit": options.BALANCER_MEMORY,
            "pids_limit": options.BALANCER_PIDS,
        }

    def _bridge_spec(self, files: Sequence[str]) -> dict[str, Any]:
        """The options of a balancer whose rules are in its own network namespace."""
        settings = self._settings
        ports = {f"{own}/tcp": (settings.bind, port) for port, own in options.published_ports(settings)}
        return {
            "network": settings.project,
            "volumes": files,
            "ports": ports,
            "environment": options.own_path(settings),
            "cap_add": options.BALANCER_CAPABILITIES,
            "sysctls": options.BALANCER_SYSCTLS,
        }

    def _host_spec(self, files: Sequence[str]) -> dict[str, Any]:
        """The options of a balancer whose rules are in the host's namespace."""
        settings, network = self._settings, self._network
        path = options.host_path(settings, f"br-{network.id[:12]}", network.attrs["IPAM"]["Config"][0]["Subnet"])
        capabilities = [*options.BALANCER_CAPABILITIES]
        if min(settings.manager_port, *dict(settings.ports)) < 1024:
            # To reserve the service's ports, and to bind the manager's port at HTTP_ADDRESS.
            capabilities.append("NET_BIND_SERVICE")
        # The lock that programs of the legacy flavour take. The file may be missing after a reboot. Then a container
        # with a mount does not start; for a volume, Docker would create a directory, which no program could lock.
        lock = str(XTABLES_LOCK)
        locks = [docker.types.Mount(lock, lock, type="bind")] if XTABLES_LOCK.is_file() else []
        return {
            "network_mode": "host",
            "volumes": files,
            "mounts": locks,
            "environment": path,
            "cap_add": capabilities,
        }

    def repair_balancer(self) -> None:
        """Resumes the balancer if it was only paused. Otherwise replaces it by a new one with the current settings."""
        with engine_errors():
            for row in self._rows():
                if _role(row) != "balancer":
                    continue
                if row["State"] == "paused" and self._is_current(row):
                    self._client.api.unpause(row["Id"])
                    return
                self._remove_balancer(row)
            name, labels = f"{self._settings.project}-balancer", options.labels(self._settings.project, "balancer")
            labels["lbscaler.config"] = self._balancer_digest
            specific = self._balancer_spec()
            if self._on_host:
                # Otherwise its name would be the host's. Its successor has the same name, because the rules and their
                # counters stay.
                specific["hostname"] = labels[HOST_NAME] = name
            self._run(name=name, labels=labels, **specific)

    def _remove_balancer(self, row: Row) -> None:
        """Removes a balancer, or waits until a removal that is in progress has ended: only then is its name free."""
        for _ in range(REMOVAL_TRIES):
            try:
                self._client.api.remove_container(row["Id"], v=True, force=True)
            except docker.errors.NotFound:
                return
            except docker.errors.APIError as error:
                if error.status_code != CONFLICT:
                    raise
                time.sleep(REMOVAL_PAUSE)

    def _run(self, name: str, attach: Iterable[str] = (), **arguments: Any) -> Any:
        """Creates a container, attaches it to more networks and starts it. Removes it again if it does not start."""
        try:
            container = self._client.containers.create(name=name, **arguments)
        except docker.errors.APIError as error:
            if error.status_code == CONFLICT:
                raise NameTaken(str(error.explanation)) from error
            raise
        try:
            # Docker before 25.0 accepts only one network when it creates a container.
            for network in attach:
                self._client.api.connect_container_to_network(container.id, network)
            container.start()
            container.reload()
        # A container that did not start would keep its name in use.
        except Exception:
            with suppress(docker.errors.APIError, requests.RequestException):
                container.remove(force=True, v=True)
            raise
        return container

    def _container(self, row: Row) -> Container:
        id_, status = str(row["Id"]), str(row["State"])
        name = str(row["Names"][0]).lstrip("/")
        exit_code = self._exit_code(id_) if status in ("exited", "dead") else None
        spec = row["Labels"].get("lbscaler.spec", "")
        disconnected = self._settings.project not in row["NetworkSettings"]["Networks"]
        return Container(id_, name, self._ip(row), status, exit_code, spec=str(spec), disconnected=disconnected)

    def _ip(self, row: Row) -> str:
        """The container's address on the backends' network; empty if it has none."""
        network = row["NetworkSettings"]["Networks"].get(self._settings.project, {})
        return str(network.get("IPAddress", ""))

    def _exit_code(self, container_id: str) -> int | None:
        """The exit code, which the list does not include. None if the container was removed in the meantime."""
        with suppress(docker.errors.NotFound):
            return int(self._client.api.inspect_container(container_id)["State"]["ExitCode"])
        return None

    def spec(self) -> str:
        """What new backends are created from, as JSON: the image's id and every option.

        Each backend keeps it as a label, so that a failed update can return to the spec of the earlier backends.
        """
        with engine_errors():
            image, user = self._image()
        wanted = options.backend_options(self._settings, user)
        wanted["volumes"] += options.secret_mounts(self._settings)
        return json.dumps({"image": image["Id"], **wanted})

    def launch(self, name: str, spec: str) -> Container:
        """Creates and starts a backend from `spec`. Raises NameTaken if another container has the name."""
        wanted = json.loads(spec)
        wanted["labels"] |= options.labels(self._settings.project, "backend") | {"lbscaler.spec": spec}
        with engine_errors():
            wanted["environment"] = environment(wanted.pop("env_file"), wanted["environment"])
            container = self._run(
                name=name,
                network=self._settings.project,
                hostname=name,
                sysctls=options.SYSCTLS,
                healthcheck={"test": ["NONE"]},  # the balancer probes; this engine would not use the result
                **wanted,
            )
            ip = container.attrs["NetworkSettings"]["Networks"][self._settings.project]["IPAddress"]
        return Container(container.id, name, ip, container.status, spec=spec)

    def stop(self, container_id: str) -> None:
        """Sends SIGTERM, then SIGKILL after STOP_GRACE, and removes the container. Does nothing if there is none."""
        with engine_errors(), suppress(docker.errors.NotFound):
            container = self._client.containers.get(container_id)
            container.stop(timeout=STOP_GRACE)
            container.remove(force=True, v=True)

    def last_log_line(self, container_id: str) -> str:
        """The last line of its log, and in brackets the setting that may help."""
        with engine_errors():
            container = self._client.containers.get(container_id)
            text = container.logs(tail=LOG_LINES).decode(errors="replace").strip()
            state = container.attrs["State"]
        line = text.splitlines()[-1].strip() if text else "none"
        exit_code = None if state.get("Running") else int(state.get("ExitCode", 0))
        return with_hint(line, failure_hint(text, exit_code, bool(state.get("OOMKilled"))))

    def events(self) -> Iterator[Event]:
        """The changes of containers from now on. Ends, or raises EngineError, when the engine becomes unreachable."""
        filters = {"type": ["container", "network"], "event": list(EVENTS)}
        # A client of its own, without a timeout, because there may be no event for hours.
        with (
            engine_errors(),
            closing(docker.from_env(timeout=None)) as client,
            closing(client.events(decode=True, filters=filters)) as stream,
        ):
            for event in stream:
                action, attributes = str(event["Action"]), event["Actor"]["Attributes"]
                code = attributes.get("exitCode" if action == "die" else "signal", "0")
                # A signal may also be reported by its name. Then the code is 0.
                yield Event(action, str(event["Actor"]["ID"]), int(code) if code.isdecimal() else 0)


def _host_name(balancer: Row) -> str:
    """The name under which a balancer reports. Unless it is set, it is the short id of its container."""
    return str(balancer["Labels"].get(HOST_NAME) or balancer["Id"][:12])


def _role(row: Row) -> str:
    return str(row["Labels"].get("lbscaler.role", ""))
