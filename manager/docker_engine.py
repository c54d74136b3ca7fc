"""The Docker Engine, through its Unix socket (or DOCKER_HOST): it and its twin swarm_engine alone import `docker`.

Every call may take long and may raise EngineError; none touches a container without this project's labels.
"""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterable, Iterator
from contextlib import closing, contextmanager, suppress

import docker
import docker.errors
import requests

from engine import PIDS, SYSCTLS, Engine, EngineError, Event, NameTaken, TakenOver, advice, options
from fleet import Container
from settings import Settings

STOP_GRACE = 10  # seconds between SIGTERM and SIGKILL for a backend that has drained


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
    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._labels = {"lbscaler.project": settings.project, "lbscaler.role": "backend"}
        self._filter = {"label": [f"{key}={value}" for key, value in self._labels.items()]}
        self._routed: dict[str, tuple[str, str]] = {}
        with engine_errors():
            self._client = docker.from_env(timeout=30)

    def gateway(self) -> str:
        """The host's address on the backends' network, where the balancer finds the manager."""
        return self._network("Gateway")

    def subnet(self) -> str:
        return self._network("Subnet")

    def _network(self, what: str) -> str:
        with engine_errors():
            return str(self._client.networks.get(self._settings.project).attrs["IPAM"]["Config"][0][what])

    def list(self) -> list[Container]:
        """All our backends, running or not, in one call."""
        ours = {"label": f"lbscaler.project={self._settings.project}"}
        by_role: dict[str, list[Container]] = {"backend": [], "balancer": []}
        with engine_errors():
            for row in self._client.api.containers(all=True, filters=ours):
                by_role.setdefault(row["Labels"].get("lbscaler.role", ""), []).append(self._container(row))
            if self._settings.preserve_client_ip:
                self._route_through(by_role["balancer"], by_role["backend"])
        return by_role["backend"]

    def _route_through(self, balancers: Iterable[Container], backends: Iterable[Container]) -> None:
        """Points the backends' default route at the balancer, from outside: they keep no capability to do it."""
        for balancer in balancers:
            for backend in backends:
                wanted = (backend.id, balancer.ip)
                if backend.status != "running" or not balancer.ip or self._routed.get(backend.id) == wanted:
                    continue
                try:
                    pid = self._client.api.inspect_container(backend.id)["State"]["Pid"]
                except docker.errors.NotFound:
                    continue  # gone since it was listed
                enter = f"nsenter --net=/proc/{pid}/ns/net ip route replace default via"
                command = [*enter.split(), balancer.ip]
                done = subprocess.run(command, capture_output=True, text=True, check=False)
                if done.returncode:
                    raise EngineError(f"route of {backend.name} through the balancer: {done.stderr.strip()}")
                self._routed[backend.id] = wanted

    def _container(self, row: dict[str, object]) -> Container:
        networks = row["NetworkSettings"]["Networks"]  # type: ignore[index]
        ip = networks.get(self._settings.project, {}).get("IPAddress", "")
        name = str(row["Names"][0]).lstrip("/")  # type: ignore[index]
        spec = row["Labels"].get("lbscaler.spec") or row["ImageID"]  # type: ignore[attr-defined]
        return Container(str(row["Id"]), name, ip, str(row["State"]), spec=str(spec))

    def spec(self) -> str:
        """What new backends are to be made from, in full: the image's id and every option, as a text. It is kept as a
        label, so that an update can go back to what the backends before it were made from."""
        with engine_errors():
            image = self._client.api.inspect_image(self._settings.image)
        return json.dumps({"image": image["Id"], **options(self._settings, str(image["Config"].get("User") or ""))})

    def launch(self, name: str, spec: str) -> Container:
        """Creates and starts a backend from `spec`. Raises NameTaken when a stranger bears the name."""
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
            try:
                container.start()
                container.reload()
            except Exception:
                with suppress(docker.errors.APIError, requests.RequestException):
                    container.remove(force=True, v=True)
                raise
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
            wanted = ["die", "kill", "pause", "oom", "disconnect"]
            filters = {"type": ["container", "network"], "event": wanted}
            with (
                closing(docker.from_env(timeout=None)) as client,
                closing(client.events(decode=True, filters=filters)) as stream,
            ):
                for event in stream:
                    attributes = event["Actor"]["Attributes"]
                    code = attributes.get("exitCode" if event["Action"] == "die" else "signal", "0")
                    yield Event(event["Action"], event["Actor"]["ID"], int(code) if code.isdecimal() else 0)
