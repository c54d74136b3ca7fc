"""Finds, creates and updates the project's services in a Swarm. Repeats an update if another one was faster."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

import docker.errors

from core.engine import EngineError
from engines.options import labels

SECOND = 10**9  # in Swarm's nanoseconds
TRIES = 5
FIRST_PAUSE = 0.05  # seconds before the second try; doubled for each further one
# Swarm accepts an update only for the version of the object that it has now. It reports an older version as status 500
# with this text and has no code for it.
OVERTAKEN = "out of sequence"
# The parts of a service's spec that we set: name in the Engine API -> parameter of the SDK.
PARAMETERS = {
    "Name": "name",
    "Labels": "labels",
    "TaskTemplate": "task_template",
    "Mode": "mode",
    "UpdateConfig": "update_config",
    "EndpointSpec": "endpoint_spec",
}

ApiObject = Mapping[str, Any]  # a service, task or node as the Engine API describes it
Spec = dict[str, Any]  # a service's spec in the Engine API


def secret_reference(id_: str, name: str, file: str, uid: int = 0) -> dict[str, Any]:
    """Gives a task the secret as /run/secrets/FILE, readable by one user."""
    owner = {"UID": str(uid), "GID": str(uid), "Mode": 0o400}
    return {"SecretID": id_, "SecretName": name, "File": {"Name": file, **owner}}


def retry_when_overtaken(change: Callable[[], None]) -> None:
    """Calls `change`, which reads an object and updates it. Repeats the call if another update came in between."""
    for attempt in range(TRIES):
        try:
            change()
        except docker.errors.APIError as error:
            if OVERTAKEN not in str(error) or attempt == TRIES - 1:
                raise
            time.sleep(FIRST_PAUSE * 2**attempt)
        else:
            return


def is_paused(service: ApiObject) -> bool:
    """Whether Swarm has paused an update of the service because a new task failed. The service keeps the new spec. Any
    change of the service, even of the number of its tasks, resumes the update."""
    return (service.get("UpdateStatus") or {}).get("State") == "paused"


class SwarmServices:
    """The project's services `PROJECT-backend` and `PROJECT-balancer`, by their role.

    Raises EngineError for a service with such a name that does not have the project's labels.
    """

    def __init__(self, client: Any, project: str) -> None:
        self._client, self._project = client, project

    def find(self, role: str) -> dict[str, Any] | None:
        """The service as the Engine API describes it; None if there is none."""
        name = f"{self._project}-{role}"
        try:
            service: dict[str, Any] = self._client.api.inspect_service(name)
        except docker.errors.NotFound:
            return None
        if not labels(self._project, role).items() <= service["Spec"]["Labels"].items():
            raise EngineError(f"a service {name} exists and is not ours; choose another --project")
        return service

    def put(self, role: str, edit: Callable[[ApiObject | None], Spec]) -> None:
        """Creates or updates the service. `edit` returns the new spec, given the present service, if there is one."""

        def change() -> None:
            service = self.find(role)
            spec = edit(service)
            arguments = {parameter: spec.get(key) for key, parameter in PARAMETERS.items()}
            if service is None:
                self._client.api.create_service(**arguments)
            else:
                self._client.api.update_service(service["ID"], service["Version"]["Index"], **arguments)

        retry_when_overtaken(change)
