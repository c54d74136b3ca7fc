"""The engine for many hosts: the backends are the tasks of one replicated service of a Docker Swarm.

Swarm places, restarts and moves the tasks, and chooses which ones to stop. The manager sets their number and their spec
(`resize`) and reads the list of tasks. A task that Swarm is going to stop is listed as `stopping` before its process
gets a signal, so that the balancers send it no new connections while it still serves.

Every call may take long and may raise EngineError. None changes a service without this project's labels. `list`,
`resize` and `repair_balancer` raise TakenOver when another manager controls the fleet.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from functools import cached_property

from core import backend_files
from core.engine import EngineError, Event
from core.fleet import Container
from core.settings import Settings
from core.state_files import digest
from engines import swarm_backends, swarm_balancer
from engines.base import BaseEngine, engine_errors
from engines.failure_hints import failure_hint, with_hint
from engines.options import BalancerOptions
from engines.swarm_claim import FleetClaim
from engines.swarm_services import ApiObject, Spec, SwarmServices, is_paused, secret_reference
from engines.swarm_tasks import Task, parse_task

POLL_INTERVAL = 0.2  # seconds, at least, between two lists of the tasks
MAX_POLLING_LOAD = 0.1  # the largest share of the time that listing may take

log = logging.getLogger("manager")


class SwarmEngine(BaseEngine):
    def __init__(self, settings: Settings, balancer_options: BalancerOptions) -> None:
        super().__init__(settings, balancer_options)
        self.replicas = 0  # the number of tasks that the service had to run when it was last listed
        self._services = SwarmServices(self._client, settings.project)
        self._claim = FleetClaim(self._client, settings.project)
        self._wanted_spec = ""
        self._running: set[str] = set()  # ids of the tasks that ran when they were last listed
        self._logged_errors: set[str] = set()  # of the tasks that were listed last

    def gateway(self) -> str:
        """This node's address in the network of the nodes."""
        return self._settings.advertise or self._node_address

    @cached_property  # the tests of the data path need it, also while the engine is unreachable
    def _node_address(self) -> str:
        with engine_errors():
            return str(self._client.info()["Swarm"]["NodeAddr"])

    def spec(self) -> str:
        """What tasks are created from, as JSON."""
        with engine_errors():
            image, user = self._image()
            secrets = self._backend_secrets(user)
            template = swarm_backends.task_template(self._settings, self._pinned(image), user, secrets)
        self._wanted_spec = json.dumps(template, sort_keys=True)
        return self._wanted_spec

    def _backend_secrets(self, image_user: str) -> Sequence[Spec]:
        files = backend_files.secret_files(self._settings)
        names = [backend_files.swarm_secret(self._settings.project, path) for path in files.values()]
        uid = backend_files.user_id(self._settings, image_user) or 0  # run.sh refuses a user without a number
        found = zip(self._secret_ids(names), names, files, strict=True)
        return [secret_reference(id_, name, file, uid) for id_, name, file in found]

    def _secret_ids(self, names: Sequence[str]) -> Sequence[str]:
        """The ids of secrets: a service refers to them by id. Raises EngineError if one does not exist."""
        ids = {secret["Spec"]["Name"]: secret["ID"] for secret in self._client.api.secrets()}
        missing = [name for name in names if name not in ids]
        if missing:
            raise EngineError(f"this Swarm has no secret {', '.join(missing)}; ./run.sh makes it")
        return [ids[name] for name in names]

    def _pinned(self, image: ApiObject) -> str:
        """The image by its digest, because its tag may later name another one.

        Without a registry, the image by its id: only this node has it.
        """
        if not self._settings.registry:
            return str(image["Id"])

        # Each node that pushes the same image may create another digest. The digest in use stays, because another one
        # would be an update of all backends.
        service = self._services.find("backend")
        in_use = service["Spec"]["TaskTemplate"]["ContainerSpec"]["Image"] if service else ""
        if in_use in image["RepoDigests"]:
            return str(in_use)
        for reference in image["RepoDigests"]:
            if reference.startswith(f"{self._settings.registry}/"):
                return str(reference)
        return self._settings.image

    # -- the list of tasks --------------------------------------------------------------------------------------------

    def list(self) -> Sequence[Container]:
        """The running tasks. A task that has ended since the last call is listed once more with its exit code."""
        with engine_errors():
            nodes = self._client.api.nodes()
            self._claim.hold(nodes)
            down = {node["ID"] for node in nodes if node["Status"]["State"] == "down"}
            self._note_balancers(nodes, down)
            service = self._services.find("backend")
            listed = self._tasks(service)
            self.replicas = service["Spec"]["Mode"]["Replicated"]["Replicas"] if service else 0
            if service and is_paused(service):
                self.resize(self.replicas, self._wanted_spec)
                service = self._services.find("backend")
            self.made_from = self._spec_for_plan(service) if service else ""
        # Swarm cannot stop tasks on a node that is down and never reports their end. Without this, they would drain for
        # ever.
        tasks = [task for task in listed if not (task.stopping and task.node in down)]
        self._log_ends(tasks)

        running = [task for task in tasks if task.running and task.ip]
        just_ended = [task for task in tasks if task.ended and task.id in self._running]
        self._running = {task.id for task in running}
        current_label = swarm_backends.task_label(service["Spec"]["Labels"]["lbscaler.spec"]) if service else ""
        return [self._container(task, current_label) for task in (*running, *just_ended)]

    def _tasks(self, service: ApiObject | None) -> Sequence[Task]:
        listed = self._client.api.tasks(filters={"service": service["ID"]}) if service else ()
        return tuple(parse_task(task, self._settings.project) for task in listed)

    def _container(self, task: Task, current_label: str) -> Container:
        """`current_label`: the label of the tasks that the service creates now."""
        # During an update, tasks of both specs run.
        is_current = task.spec_label == current_label
        return Container(
            id=task.id,
            name=self._task_name(task),
            ip=task.ip,
            status="exited" if task.ended else "running",
            exit_code=task.exit_code,
            spec=self.made_from if is_current else task.spec_label,
            node=task.node,
            stopping=task.stopping,
        )

    def _task_name(self, task: Task) -> str:
        return f"{self._settings.project}-backend-{task.slot}.{task.id[:5]}"

    def _log_ends(self, tasks: Iterable[Task]) -> None:
        """Logs each different error of tasks once: Swarm restarts a failed task every second.

        If a task never ran, its error is reported nowhere else.
        """
        failed = {task.error: task for task in tasks if task.ended and task.error}
        for error in sorted(failed.keys() - self._logged_errors):
            task = failed[error]
            hint = failure_hint(error, task.exit_code or 1)  # a task that never ran has no exit code
            log.warning("task %s ended: %s", self._task_name(task), with_hint(error, hint))
        self._logged_errors = set(failed)  # forgets errors of tasks that Swarm no longer lists

    def events(self) -> Iterator[Event]:
        """One event for each change of a task's state or desired state, or of the service of balancers.

        Swarm has events for nodes and services but not for tasks, so this method lists the tasks regularly, and less
        often if that is slow.
        """
        before: object = None
        while True:
            began = time.monotonic()
            with engine_errors():
                tasks = self._tasks(self._services.find("backend"))
                balancer = self._services.find("balancer")
            states = {(task.id, task.desired_state, task.state) for task in tasks}
            now = (states, balancer["Version"]["Index"] if balancer else None)
            if now != before:
                yield Event("task", "", 0)
            before = now
            time.sleep(max(POLL_INTERVAL, (time.monotonic() - began) / MAX_POLLING_LOAD))

    # -- number and spec of the tasks ---------------------------------------------------------------------------------

    def resize(self, count: int, spec: str) -> None:
        """Sets the number of tasks and what they are created from. Creates the service if there is none.

        An update that Swarm has paused is undone by the same change of the service.
        """

        def edit(service: ApiObject | None) -> Spec:
            if service is None:
                return swarm_backends.new_service(self._settings.project, count, spec)
            new = service["Spec"]
            if is_paused(service):
                self._note_failed_update(new["Labels"])
                new = swarm_backends.with_previous_tasks(new)
            # An unchanged spec is not written, because the label of the previous one would be lost.
            present = new["Labels"].get("lbscaler.spec", "")
            if spec != present and not self._is_refused(spec):
                new = swarm_backends.with_tasks(new, spec, previous=present)
            return {**new, "Mode": {"Replicated": {"Replicas": count}}, "UpdateConfig": swarm_backends.UPDATE}

        with engine_errors():
            self._claim.hold(self._client.api.nodes())
            self._services.put("backend", edit)

    def _spec_for_plan(self, service: ApiObject) -> str:
        """What the tasks are created from; the plan compares it with the wanted spec.

        After a refused update this is the wanted spec, so that the plan does not try the update again.
        """
        if self._is_refused(self._wanted_spec):
            return self._wanted_spec
        return str(service["Spec"]["Labels"]["lbscaler.spec"])

    def _note_failed_update(self, labels: Mapping[str, str]) -> None:
        """Marks the wanted spec as refused if it is the one whose update Swarm has paused. `labels`: the service's."""
        failed = labels["lbscaler.spec"]
        # The return to the previous spec may be paused as well. It has to continue, so it is not refused.
        is_return = failed == labels.get("lbscaler.before", failed)
        if failed == self._wanted_spec and not is_return and not self.refused:
            self.refused = digest(failed)
            log.error("update given up, going back: Swarm paused it, its backends did not stay up")

    def _is_refused(self, spec: str) -> bool:
        return bool(self.refused) and digest(spec) == self.refused

    # -- the balancers ------------------------------------------------------------------------------------------------

    def _note_balancers(self, nodes: Iterable[ApiObject], down: Set[str]) -> None:
        """Updates the state of the service of balancers, and which balancers run. `down`: ids of nodes."""
        service = self._services.find("balancer")
        # Swarm lists the tasks on a node that is down as if they were running.
        tasks = [task for task in self._tasks(service) if task.node not in down]
        self.balancer = swarm_balancer.state(service, self._balancer_spec, tasks)
        running = [task for task in tasks if task.running]
        self.balancers = frozenset(map(swarm_balancer.report_name, running))

        serving_nodes = {task.node for task in running if not task.stopping}
        targets = []
        for node in nodes:
            ip = str(node["Status"].get("Addr", ""))
            if node["ID"] in serving_nodes and ip not in swarm_balancer.NO_ADDRESS:
                targets.append((ip, self._settings.port))
        self._check_targets = targets  # another thread reads it

    @cached_property
    def _balancer_spec(self) -> Spec:
        nodes = self._client.api.nodes()
        manager = swarm_balancer.manager_addresses(nodes, self.gateway(), self._settings.manager_port)
        ids = self._secret_ids(self._balancer_options.secrets)
        return swarm_balancer.service_spec(self._settings, self._balancer_options, manager, ids)

    def repair_balancer(self) -> None:
        """Creates the service of balancers, or makes Swarm update it, one node at a time."""
        with engine_errors():
            self._claim.hold(self._client.api.nodes())
            self._services.put("balancer", lambda _: self._balancer_spec)
