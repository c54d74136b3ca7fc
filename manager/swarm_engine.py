"""Docker Swarm as the engine: the twin of docker_engine for many hosts.

The backends are the tasks of one replicated service. Swarm places, restarts and moves them, and picks who leaves; the
manager says how many (`resize`) and sees the rest in the list of tasks. A task that Swarm wants gone is listed as
`leaving` before its process is told, so that the balancers stop dealing to it while it still serves.
One manager at a time: the one that began last writes its name on the service, and who finds another's ends.
Every call may take long and may raise EngineError; none touches a service but this project's own.
"""

from __future__ import annotations

import json
import logging
import os
import secrets
import socket
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import docker
import docker.errors
import docker.utils

from docker_engine import PIDS, SYSCTLS, EngineError, Event, TakenOver, engine_errors, options
from fleet import Container
from settings import Settings

LINGER = 3  # seconds the sample server goes on serving after SIGTERM: news travels further here
LOOK, LOOK_COST = 0.2, 0.1  # seconds between looks at the tasks, and the most of the time that looking may take
TRIES = 5  # of an update that others' updates overtake
SECOND = 10**9  # in Swarm's nanoseconds
ENDED = ("complete", "shutdown", "failed", "rejected", "remove", "orphaned")

log = logging.getLogger("manager")


def task_template(settings: Settings, image: str, image_user: str) -> dict[str, Any]:
    """What a backend's task is made from, in the words of the Engine's API."""
    wanted = options(settings, image_user)
    container = {
        "Image": image,
        "Args": wanted["command"],
        "Env": [f"LINGER={LINGER}", *wanted["environment"]],
        "User": wanted["user"],
        "Labels": {"lbscaler.project": settings.project, "lbscaler.role": "backend"},
        "CapabilityDrop": wanted["cap_drop"],
        "ReadOnly": wanted["read_only"],
        "Sysctls": SYSCTLS,
        "Mounts": [_tmpfs(place) for place in wanted["tmpfs"]] + [_mount(volume) for volume in wanted["volumes"]],
        "StopGracePeriod": round(max(1.0, settings.drain_timeout) * SECOND),
    }
    limits = {"MemoryBytes": docker.utils.parse_bytes(wanted["mem_limit"]), "Pids": PIDS}
    return {
        "ContainerSpec": {key: value for key, value in container.items() if value is not None},
        "Resources": {"Limits": limits | ({"NanoCPUs": wanted["nano_cpus"]} if wanted["nano_cpus"] else {})},
        "RestartPolicy": {"Condition": "any", "Delay": SECOND},
        "Placement": {
            "Constraints": list(settings.constraint),
            "Preferences": [{"Spread": {"SpreadDescriptor": label}} for label in settings.spread],
        },
        "Networks": [{"Target": settings.project}],
    }


def _tmpfs(place: str) -> dict[str, Any]:
    return {"Type": "tmpfs", "Target": place, "TmpfsOptions": {"Mode": 0o1777}}


def _mount(volume: str) -> dict[str, Any]:
    source, target, mode = volume.split(":")
    kind = "bind" if source.startswith("/") else "volume"
    return {"Type": kind, "Source": source, "Target": target, "ReadOnly": mode == "ro"}


# An update is Swarm's: a new task is up before an old one is told to go, and it goes back where new ones fail.
UPDATE = {"Parallelism": 1, "Order": "start-first", "FailureAction": "rollback", "Monitor": 5 * SECOND}


class SwarmEngine:
    def __init__(self, settings: Settings) -> None:
        self.replicas: int | None = 0  # what the service is told to run, as last seen
        self._settings = settings
        self._name = f"{settings.project}-backend"
        self._labels = {"lbscaler.project": settings.project, "lbscaler.role": "backend"}
        self._alive: set[str] = set()
        self._me = f"{socket.gethostname()} pid {os.getpid()} {secrets.token_hex(4)}"
        self._claimed = False
        self._tried = self._refused = ""  # the spec of the last update, and the one that Swarm has gone back from
        with engine_errors():
            self._client = docker.from_env(timeout=30)

    def gateway(self) -> str:
        """This node's address among the others, where their balancers find the manager."""
        with engine_errors():
            return str(self._client.info()["Swarm"]["NodeAddr"])

    def subnet(self) -> str:
        with engine_errors():
            return str(self._client.networks.get(self._settings.project).attrs["IPAM"]["Config"][0]["Subnet"])

    def spec(self) -> str:
        """What backends are to be made from, in full, as a text."""
        with engine_errors():
            image = self._client.api.inspect_image(self._settings.image)
        user = str(image["Config"].get("User") or "")
        return json.dumps(task_template(self._settings, self._pinned(image), user), sort_keys=True)

    def _pinned(self, image: Mapping[str, Any]) -> str:
        """The image by digest, for a tag may come to mean another; by its id where there is no registry, and then only
        on the node that has it."""
        if not self._settings.registry:
            return str(image["Id"])
        mine = (d for d in image["RepoDigests"] if d.startswith(f"{self._settings.registry}/"))
        return next(mine, self._settings.image)

    def list(self) -> list[Container]:
        """The tasks that run, and each one that has ended once more, so that its end is seen."""
        with engine_errors():
            service = self._service()
            if service is None:
                self.replicas, self._alive = 0, set()
                return []
            if not self._claimed:
                self._change(lambda spec: spec["Labels"].update({"lbscaler.manager": self._me}))
                self._claimed = True
            self.replicas = service["Spec"]["Mode"]["Replicated"]["Replicas"]
            tasks = self._client.api.tasks(filters={"service": service["ID"]})
            lost = {node["ID"] for node in self._client.api.nodes() if node["Status"]["State"] == "down"}
        spec = self._spec_of(service)
        # On a node that is down nobody is left to end its tasks, nor to say that they have ended.
        tasks = [t for t in tasks if not (t.get("NodeID") in lost and t["DesiredState"] != "running")]
        running = [task for task in tasks if task["Status"]["State"] == "running" and _address(task)]
        ended = [task for task in tasks if task["Status"]["State"] in ENDED and task["ID"] in self._alive]
        self._alive = {task["ID"] for task in running}
        return [self._container(task, spec) for task in (*running, *ended)]

    def _service(self) -> dict[str, Any] | None:
        try:
            found: dict[str, Any] = self._client.api.inspect_service(self._name)
        except docker.errors.NotFound:
            return None
        if not self._labels.items() <= found["Spec"]["Labels"].items():
            raise EngineError(f"a service {self._name} is there and not ours; choose another --project")
        holder = found["Spec"]["Labels"].get("lbscaler.manager", "")
        if self._claimed and holder != self._me:
            raise TakenOver(f"the manager at {holder} has taken over; this one ends")
        return found

    def _spec_of(self, service: Mapping[str, Any]) -> str:
        """What the service is made from. Where Swarm has gone back from what it was to be made from, that, as far as
        the plan can tell: it is not to be tried again by this manager."""
        running = str(service["Spec"]["Labels"].get("lbscaler.spec", ""))
        if running != self._tried and (service.get("UpdateStatus") or {}).get("State", "").startswith("rollback"):
            self._refused = self._tried
        return self._refused if self._refused else running

    def _container(self, task: Mapping[str, Any], spec: str) -> Container:
        status = task["Status"]
        return Container(
            id=task["ID"],
            name=f"{self._name}-{task['Slot']}.{task['ID'][:5]}",
            ip=_address(task),
            status="running" if status["State"] == "running" else "exited",
            exit_code=status.get("ContainerStatus", {}).get("ExitCode"),
            spec=spec,
            node=task.get("NodeID", ""),
            leaving=task["DesiredState"] != "running",
        )

    def resize(self, count: int, spec: str) -> None:
        """Has the service run so many tasks made from `spec`, and makes it where it is not there."""

        def edit(service: dict[str, Any]) -> None:
            if service["Labels"].get("lbscaler.spec") != spec and self._refused != spec:
                service["Labels"]["lbscaler.spec"] = spec
                service["TaskTemplate"] = json.loads(spec)
            service["Mode"]["Replicated"]["Replicas"] = count

        with engine_errors():
            if self._service() is None:
                self._create(count, spec)
            else:
                self._change(edit)
        self._tried = spec

    def _change(self, edit: Callable[[dict[str, Any]], None]) -> None:
        """Edits the service as it is now; looks again where somebody else's update came between look and update."""
        for attempt in range(TRIES):
            service = self._service()
            if service is None:
                return
            edit(service["Spec"])
            try:
                self._update(service)
            except docker.errors.APIError as error:
                if "out of sequence" not in str(error) or attempt == TRIES - 1:
                    raise
                time.sleep(0.05 * 2**attempt)
            else:
                return

    def _create(self, count: int, spec: str) -> None:
        self._client.api.create_service(
            json.loads(spec),
            name=self._name,
            labels={**self._labels, "lbscaler.spec": spec, "lbscaler.manager": self._me},
            mode={"Replicated": {"Replicas": count}},
            update_config=UPDATE,
            rollback_config={"Parallelism": 1, "Order": "start-first"},
            endpoint_spec={"Mode": "dnsrr"},  # no virtual address: balancing is ours
        )
        self._claimed = True

    def _update(self, service: Mapping[str, Any]) -> None:
        spec = service["Spec"]
        self._client.api.update_service(
            service["ID"],
            service["Version"]["Index"],
            task_template=spec["TaskTemplate"],
            name=spec["Name"],
            labels=spec["Labels"],
            mode=spec["Mode"],
            update_config=UPDATE,
            rollback_config=spec.get("RollbackConfig"),
            endpoint_spec=spec.get("EndpointSpec"),
        )

    def launch(self, name: str, spec: str) -> Container:
        raise EngineError(f"{name}: Swarm launches its tasks itself, for {spec}")

    def stop(self, container_id: str) -> None:
        raise EngineError(f"{container_id}: Swarm stops its tasks itself")

    def last_words(self, container_id: str) -> str:
        """What Swarm says of the task's end."""
        with engine_errors():
            status = self._client.api.inspect_task(container_id)["Status"]
        return str(status.get("Err") or status.get("Message") or "none")

    def events(self) -> Iterator[Event]:
        """A hint whenever a task's state or Swarm's wish for it has changed: Swarm tells of nodes and services, not of
        tasks, so this looks again and again, seldom where looking is slow."""
        before: object = None
        while True:
            began = time.monotonic()
            with engine_errors():
                tasks = self._client.api.tasks(filters={"service": self._name}) if self._service() else []
            now = {(task["ID"], task["DesiredState"], task["Status"]["State"]) for task in tasks}
            if now != before:
                yield Event("task", "", 0)
            before = now
            time.sleep(max(LOOK, (time.monotonic() - began) / LOOK_COST))


def _address(task: Mapping[str, Any]) -> str:
    """Its address on the overlay; empty while it has none."""
    attachments: Iterable[Mapping[str, Any]] = task.get("NetworksAttachments") or ()
    addresses = [address for attachment in attachments for address in attachment.get("Addresses") or ()]
    return addresses[0].split("/")[0] if addresses else ""
