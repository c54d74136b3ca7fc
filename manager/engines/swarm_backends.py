"""The backends as tasks of a replicated Swarm service: what they are created from. Pure, except that
`task_template` reads the files of --env-file."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import docker.utils

from core import backend_files
from core.settings import Settings
from core.state_files import digest
from engines import options
from engines.swarm_services import SECOND, Spec
from engines.swarm_tasks import SPEC_LABEL

# Seconds that the sample server continues to serve after SIGTERM. Longer than with one host, because each balancer has
# to receive the change from the manager first.
SAMPLE_SERVER_LINGER = 3
# Swarm starts a new task before it stops an old one, and pauses when a new task fails within Monitor. The manager then
# restores the previous spec. It does not let Swarm roll back: the service would not show which spec has failed.
UPDATE = {"Parallelism": 1, "Order": "start-first", "FailureAction": "pause", "Monitor": 5 * SECOND}


def task_template(settings: Settings, image: str, image_user: str, secrets: Sequence[Spec] = ()) -> dict[str, Any]:
    """How a task is created, as the Engine API describes it. `secrets`: references to those of the Swarm."""
    wanted = options.backend_options(settings, image_user)
    environment = backend_files.environment(settings.env_file, settings.env)
    container = {
        "Image": image,
        "Args": wanted["command"],
        "Env": [f"LINGER={SAMPLE_SERVER_LINGER}", *environment],
        "User": wanted["user"],
        "Labels": {**wanted["labels"], **options.labels(settings.project, "backend")},
        "CapabilityDrop": wanted["cap_drop"],
        "ReadOnly": wanted["read_only"],
        "Privileges": {"NoNewPrivileges": True} if wanted["security_opt"] else None,  # from Docker 28 on
        "Sysctls": options.SYSCTLS,
        "Mounts": [*map(_tmpfs, wanted["tmpfs"]), *map(_mount, wanted["volumes"])],
        "StopGracePeriod": round(max(1.0, settings.drain_timeout) * SECOND),
        "Hosts": [_hosts_line(host) for host in settings.add_host] or None,
        "Ulimits": wanted["ulimits"] or None,
        "Secrets": list(secrets) or None,
    }
    limits = {
        "MemoryBytes": docker.utils.parse_bytes(wanted["mem_limit"]),
        "Pids": None if wanted["pids_limit"] == options.UNLIMITED else wanted["pids_limit"],
        "NanoCPUs": wanted["nano_cpus"],
    }
    return {
        "ContainerSpec": _without_none(container),
        "Resources": {"Limits": _without_none(limits)},
        "RestartPolicy": {"Condition": "any", "Delay": SECOND},
        "Placement": {
            "Constraints": list(settings.constraint),
            "Preferences": [{"Spread": {"SpreadDescriptor": label}} for label in settings.spread],
        },
        "Networks": [{"Target": network} for network in (settings.project, *settings.attach)],
    }


def _without_none(wanted: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in wanted.items() if value is not None}


def _hosts_line(host: str) -> str:
    name, _, address = host.partition(":")
    return f"{address} {name}"


def _tmpfs(path: str) -> dict[str, Any]:
    return {"Type": "tmpfs", "Target": path, "TmpfsOptions": {"Mode": 0o1777}}


def _mount(volume: str) -> dict[str, Any]:
    source, target, mode = volume.split(":")
    kind = "bind" if source.startswith("/") else "volume"
    return {"Type": kind, "Source": source, "Target": target, "ReadOnly": mode == "ro"}


def new_service(project: str, count: int, task_spec: str) -> Spec:
    """A service of `count` tasks, created from `task_spec` (JSON)."""
    spec = {
        "Name": f"{project}-backend",
        "Labels": options.labels(project, "backend"),
        "Mode": {"Replicated": {"Replicas": count}},
        "UpdateConfig": UPDATE,
        "EndpointSpec": {"Mode": "dnsrr"},  # no virtual address: the balancers distribute the connections
    }
    return with_tasks(spec, task_spec)


def with_tasks(service_spec: Spec, task_spec: str, previous: str = "") -> Spec:
    """The service with tasks created from `task_spec`. Its labels keep that text and the `previous` one, which is
    restored if the update fails. A label of each task says which text it was created from."""
    labels = {**service_spec["Labels"], "lbscaler.spec": task_spec}
    if previous:
        labels["lbscaler.before"] = previous
    template = json.loads(task_spec)
    template["ContainerSpec"]["Labels"][SPEC_LABEL] = task_label(task_spec)
    return {**service_spec, "Labels": labels, "TaskTemplate": template}


def with_previous_tasks(service_spec: Spec) -> Spec:
    """The service with tasks as before the last update."""
    labels = service_spec["Labels"]
    return with_tasks(service_spec, labels.get("lbscaler.before", labels["lbscaler.spec"]))


def task_label(task_spec: str) -> str:
    """The value of SPEC_LABEL for tasks created from `task_spec`: its digest. The text is a label of the service only,
    `lbscaler.spec`, because it is as large as the rest of a task."""
    return digest(task_spec)[:16]
