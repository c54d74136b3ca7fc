"""Docker Swarm as the engine: the twin of docker_engine for many hosts.

The backends are the tasks of one replicated service. Swarm places, restarts and moves them, and picks those to stop;
the manager says how many (`resize`) and sees the rest in the list of tasks. A task that Swarm wants gone is listed as
`leaving` before its process gets a signal, so that the balancers send it no more connections while it still serves.
One manager at a time: each writes a claim on its node, and a manager that finds a newer claim than its own ends.
Every call may take long and may raise EngineError; none touches a service but this project's own.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import socket
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from functools import cached_property
from typing import Any

import docker
import docker.errors
import docker.utils

from core.engine import Engine, EngineError, Event, TakenOver
from core.fleet import Container
from core.settings import Settings
from engines import path_probe, swarm_balancer
from engines.docker_engine import engine_errors
from engines.options import PIDS, SYSCTLS, BalancerOptions, advice, options

LINGER = 3  # seconds the sample server goes on serving after SIGTERM: news travels further here
LOOK, LOOK_COST = 0.2, 0.1  # seconds between looks at the tasks, and the most of the time that looking may take
TRIES = 5  # of an update that others' updates overtake
SECOND = 10**9  # in Swarm's nanoseconds
RUNNING = ("starting", "running")  # starting: it runs, and its own health check has not said yes yet
ENDED = ("complete", "shutdown", "failed", "rejected", "remove", "orphaned")
# An update is Swarm's: a new task is up before an old one is told to go, and it goes back where new ones fail.
UPDATE = {"Parallelism": 1, "Order": "start-first", "FailureAction": "rollback", "Monitor": 5 * SECOND}

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
        "Privileges": {"NoNewPrivileges": True} if wanted["security_opt"] else None,  # from Docker 28 on
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


class SwarmEngine(Engine):
    def __init__(self, settings: Settings, balancer: BalancerOptions) -> None:
        self.replicas = 0  # what the service is to run, as last seen
        self._settings, self._given = settings, balancer
        self._name = f"{settings.project}-backend"
        self._balancer_name = f"{settings.project}-balancer"
        self._wanted_spec = ""
        self._labels = {"lbscaler.project": settings.project, "lbscaler.role": "backend"}
        self._alive: set[str] = set()
        self._claim: tuple[int, str] | None = None
        self._label = f"lbscaler.manager.{settings.project}"
        self._ends_logged: set[str] | None = None
        self._check_targets: list[tuple[str, int]] = []
        self._tried = ""  # the spec of the last update
        with engine_errors():
            self._client = docker.from_env(timeout=30)

    def check_path(self) -> Mapping[str, str]:
        return path_probe.check(self._check_targets, self.gateway())

    def gateway(self) -> str:
        """This node's address among the others, where their balancers find the manager."""
        with engine_errors():
            return self._settings.advertise or str(self._client.info()["Swarm"]["NodeAddr"])

    def spec(self) -> str:
        """What backends are to be made from, in full, as a text."""
        with engine_errors():
            image = self._client.api.inspect_image(self._settings.image)
        user = str(image["Config"].get("User") or "")
        self._wanted_spec = json.dumps(task_template(self._settings, self._pinned(image), user), sort_keys=True)
        return self._wanted_spec

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
            nodes = self._client.api.nodes()
            self._hold(nodes)
            lost = {node["ID"] for node in nodes if node["Status"]["State"] == "down"}
            self._note_balancers(nodes, lost)
            service = self._service()
            if service is None:
                self.replicas, self._alive, self._ends_logged = 0, set(), set()
                return []
            self.replicas = service["Spec"]["Mode"]["Replicated"]["Replicas"]
            tasks = self._client.api.tasks(filters={"service": service["ID"]})
            spec = self._spec_of(service)
        # On a node that is down nothing ends its tasks or reports that they have ended.
        tasks = [t for t in tasks if not (t.get("NodeID") in lost and t["DesiredState"] != "running")]
        running = [task for task in tasks if task["Status"]["State"] in RUNNING and _address(task)]
        ended = [task for task in tasks if task["Status"]["State"] in ENDED and task["ID"] in self._alive]
        self._log_ends(tasks)
        self._alive = {task["ID"] for task in running}
        return [self._container(task, spec) for task in (*running, *ended)]

    def _note_balancers(self, nodes: Iterable[Mapping[str, Any]], lost: Iterable[str]) -> None:
        """What the list shows of the service of balancers and of its tasks."""
        service = self._named(self._balancer_name, "balancer")
        self.balancer = swarm_balancer.state(service, self._balancer_spec)
        tasks = self._client.api.tasks(filters={"service": service["ID"]}) if service else []
        running = swarm_balancer.running(tasks, lost)
        self.balancers = frozenset(swarm_balancer.report_name(task) for task in running)
        addresses = {node["ID"]: str(node["Status"].get("Addr", "")) for node in nodes}
        serving = [task["NodeID"] for task in running if task["DesiredState"] == "running"]
        known = [node for node in serving if addresses.get(node, "") not in swarm_balancer.NO_ADDRESS]
        self._check_targets = [(addresses[node], self._settings.port) for node in known]

    @cached_property
    def _balancer_spec(self) -> dict[str, Any]:
        nodes = self._client.api.nodes()
        where = swarm_balancer.manager_addresses(nodes, self.gateway(), self._settings.manager_port)
        secrets = {secret["Spec"]["Name"]: secret["ID"] for secret in self._client.api.secrets()}
        missing = [name for name in self._given.secrets if name not in secrets]
        if missing:
            raise EngineError(f"this Swarm has no secret {', '.join(missing)}; ./run.sh makes it")
        ids = [secrets[name] for name in self._given.secrets]
        return swarm_balancer.service_spec(self._settings, replace(self._given, manager=where), ids)

    def repair_balancer(self) -> None:
        """Creates the service of balancers, or has Swarm update it, one node at a time."""
        wanted = self._balancer_spec

        def update() -> None:
            service = self._named(self._balancer_name, "balancer")
            if service is None:
                self._client.api.create_service(**wanted)
            else:
                self._client.api.update_service(service["ID"], service["Version"]["Index"], **wanted)

        with engine_errors():
            self._hold(self._client.api.nodes())
            self._retried(update)

    def _hold(self, nodes: Iterable[Mapping[str, Any]]) -> None:
        """Claims the fleet at first; from then on sees to it that nobody has claimed it since. A claim is kept on its
        node, out of reach of the service's own rollbacks."""
        claims = [_claim(node["Spec"].get("Labels", {}).get(self._label, "")) for node in nodes]
        newest = max(claims, default=(0, ""))
        if self._claim is None:
            mine = (max(int(time.time()), newest[0] + 1), f"{socket.gethostname()}, pid {os.getpid()}")
            own = self._client.info()["Swarm"]["NodeID"]
            self._retried(lambda: self._write_claim(own, mine))
            self._claim = mine
        elif newest > self._claim:
            raise TakenOver(f"the manager at {newest[1]} has taken over; this one ends")

    def _write_claim(self, node_id: str, claim: tuple[int, str]) -> None:
        node = self._client.api.inspect_node(node_id)
        labels = {**node["Spec"].get("Labels", {}), self._label: f"{claim[0]} {claim[1]}"}
        self._client.api.update_node(node_id, node["Version"]["Index"], {**node["Spec"], "Labels": labels})

    def _log_ends(self, tasks: Iterable[Mapping[str, Any]]) -> None:
        """Once for each task that ended with an error since this manager began: Swarm's error, and what may help.
        Tasks that never ran are seen nowhere else."""
        errors = {t["ID"]: t for t in tasks if t["Status"]["State"] in ENDED and t["Status"].get("Err")}
        logged = errors.keys() if self._ends_logged is None else self._ends_logged
        for id_ in sorted(errors.keys() - logged):
            status = errors[id_]["Status"]
            # A task that never ran has no exit code; what is reported of it is an error all the same.
            exit_code = status.get("ContainerStatus", {}).get("ExitCode") or 1
            why, hint = status["Err"], advice(status["Err"], exit_code)
            log.warning("last log line of %s: %s", self._name_of(errors[id_]), f"{why} [{hint}]" if hint else why)
        self._ends_logged = set(errors)  # what Swarm no longer lists need not be remembered

    def _name_of(self, task: Mapping[str, Any]) -> str:
        return f"{self._name}-{task.get('Slot', 0)}.{task['ID'][:5]}"

    def _service(self) -> dict[str, Any] | None:
        return self._named(self._name, "backend")

    def _named(self, name: str, role: str) -> dict[str, Any] | None:
        """Our service of that name; None where there is none."""
        try:
            found: dict[str, Any] = self._client.api.inspect_service(name)
        except docker.errors.NotFound:
            return None
        ours = {**self._labels, "lbscaler.role": role}
        if not ours.items() <= found["Spec"]["Labels"].items():
            raise EngineError(f"a service {name} exists and is not ours; choose another --project")
        return found

    def _spec_of(self, service: Mapping[str, Any]) -> str:
        """What the service is made from. Where Swarm has gone back from what it was to be made from, that, as far as
        the plan can tell: it is not to be tried again by this manager."""
        labels = service["Spec"]["Labels"]
        status = service.get("UpdateStatus") or {}
        if self._tried and not self.refused and status.get("State", "").startswith("rollback"):
            self.refused = _digest(self._tried)
            log.error("update given up, Swarm goes back: its backends did not stay up")
            if labels["lbscaler.spec"] == self._tried and labels.get("lbscaler.before"):
                # The number was changed amid the update, so what Swarm went back to is the same once more.
                self._change(lambda spec: _make_from(spec, spec["Labels"]["lbscaler.before"]))
        # The plan compares with this. An update that was refused counts as done, so that it is not tried again.
        return self._wanted_spec if self._is_refused(self._wanted_spec) else str(labels["lbscaler.spec"])

    def _is_refused(self, spec: str) -> bool:
        return bool(self.refused) and _digest(spec) == self.refused

    def _container(self, task: Mapping[str, Any], spec: str) -> Container:
        status = task["Status"]
        return Container(
            id=task["ID"],
            name=self._name_of(task),
            ip=_address(task),
            status="running" if status["State"] in RUNNING else "exited",
            exit_code=status.get("ContainerStatus", {}).get("ExitCode"),
            spec=spec,
            node=task.get("NodeID", ""),
            leaving=task["DesiredState"] != "running",
        )

    def resize(self, count: int, spec: str) -> None:
        """Has the service run so many tasks made from `spec`, and makes it where it is not there."""

        def edit(service: dict[str, Any]) -> None:
            if service["Labels"].get("lbscaler.spec") != spec and not self._is_refused(spec):
                service["Labels"]["lbscaler.before"] = service["Labels"]["lbscaler.spec"]
                _make_from(service, spec)
                self._tried = spec
            service["Mode"]["Replicated"]["Replicas"] = count

        with engine_errors():
            self._hold(self._client.api.nodes())
            if self._service() is None:
                self._create(count, spec)
            else:
                self._change(edit)

    def _change(self, edit: Callable[[dict[str, Any]], None]) -> None:
        """Edits the service as it is now."""

        def change() -> None:
            if (service := self._service()) is not None:
                edit(service["Spec"])
                self._update(service)

        self._retried(change)

    def _retried(self, change: Callable[[], None]) -> None:
        """Looks and changes again where somebody else's change came between look and change."""
        for attempt in range(TRIES):
            try:
                change()
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
            labels={**self._labels, "lbscaler.spec": spec},
            mode={"Replicated": {"Replicas": count}},
            update_config=UPDATE,
            rollback_config={"Parallelism": 1, "Order": "start-first"},
            endpoint_spec={"Mode": "dnsrr"},  # no virtual address: balancing is ours
        )

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

    def last_log_line(self, container_id: str) -> str:
        """What Swarm says of the task's end."""
        with engine_errors():
            return str(self._client.api.inspect_task(container_id)["Status"].get("Err") or "none")

    def events(self) -> Iterator[Event]:
        """A hint whenever a task's state or Swarm's wish for it has changed: Swarm tells of nodes and services, not of
        tasks, so this looks again and again, seldom where looking is slow."""
        before: object = None
        while True:
            began = time.monotonic()
            with engine_errors():
                tasks = self._client.api.tasks(filters={"service": self._name}) if self._service() else []
                balancer = self._named(self._balancer_name, "balancer")
            states = {(task["ID"], task["DesiredState"], task["Status"]["State"]) for task in tasks}
            now = (states, balancer["Version"]["Index"] if balancer else None)
            if now != before:
                yield Event("task", "", 0)
            before = now
            time.sleep(max(LOOK, (time.monotonic() - began) / LOOK_COST))


def _make_from(service: dict[str, Any], spec: str) -> None:
    service["Labels"]["lbscaler.spec"] = spec
    service["TaskTemplate"] = json.loads(spec)


def _digest(spec: str) -> str:
    return hashlib.sha256(spec.encode()).hexdigest()


def _claim(text: str) -> tuple[int, str]:
    """A label's claim: when it was made, in seconds since 1970 or later, and by whom; the latest wins."""
    number, _, who = text.partition(" ")
    return (int(number), who) if number.isdecimal() else (0, "")


def _address(task: Mapping[str, Any]) -> str:
    """Its address on the overlay; empty while it has none."""
    attachments: Iterable[Mapping[str, Any]] = task.get("NetworksAttachments") or ()
    addresses = [address for attachment in attachments for address in attachment.get("Addresses") or ()]
    return addresses[0].split("/")[0] if addresses else ""
