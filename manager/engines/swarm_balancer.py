"""The balancer as a Swarm's global service: one task on every node, its port published on that node alone.

A change of settings is an update of the service, one node at a time. A node's host port is free only once its old
balancer has ended, so each node is without one for that moment; the other nodes are not.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from typing import Any

from core.engine import BalancerState
from core.settings import Settings
from engines.options import BALANCER_CAPABILITIES, BALANCER_MEMORY, BALANCER_PIDS, BALANCER_SYSCTLS, BalancerOptions

SECOND = 10**9  # in Swarm's nanoseconds
SERVICE_PORT = 8000
NO_ADDRESS = {"", "0.0.0.0"}  # what a Swarm of one node may say of its own address
SECRET_FILES = ("token", "certificate.pem")  # what they are called in the container, below /run/secrets
UPDATE = {"Parallelism": 1, "Order": "stop-first", "FailureAction": "pause", "Monitor": 5 * SECOND}

Message = Mapping[str, Any]  # as the Engine's API writes it


def service_spec(settings: Settings, options: BalancerOptions, secret_ids: Iterable[str]) -> dict[str, Any]:
    """What the service is created from, as keyword arguments of the SDK's `create_service`."""
    labels = {"lbscaler.project": settings.project, "lbscaler.role": "balancer"}
    drain = int(settings.drain_timeout)
    container = {
        "Image": options.image,
        "Labels": labels,
        "Env": [
            f"LB_MANAGERS={options.manager}",
            "LB_NODE={{.Node.ID}}",
            f"LB_BACKEND_PORT={settings.backend_port}",
            f"LB_LEAVE={drain}",
        ],
        "ReadOnly": True,
        "CapabilityDrop": ["ALL"],
        "CapabilityAdd": [f"CAP_{name}" for name in BALANCER_CAPABILITIES],
        "Sysctls": BALANCER_SYSCTLS,
        "Mounts": [{"Type": "tmpfs", "Target": "/run"}],
        "StopGracePeriod": (drain + 5) * SECOND,
        "Secrets": [
            {"SecretID": id_, "SecretName": name, "File": {"Name": file, "UID": "0", "GID": "0", "Mode": 0o400}}
            for id_, name, file in zip(secret_ids, options.secrets, SECRET_FILES, strict=True)
        ],
    }
    template = {
        "ContainerSpec": container,
        "Resources": {"Limits": {"MemoryBytes": BALANCER_MEMORY, "Pids": BALANCER_PIDS}},
        "RestartPolicy": {"Condition": "any", "Delay": SECOND // 2},
        "Placement": {"Constraints": list(settings.balancer_constraint)},
        "Networks": [{"Target": settings.project}],
    }
    port = {
        "Protocol": "tcp",
        "TargetPort": SERVICE_PORT,
        "PublishedPort": settings.port,
        "PublishMode": "host",
    }
    made = {
        "task_template": template,
        "name": f"{settings.project}-balancer",
        "mode": "global",
        "endpoint_spec": {"Mode": "dnsrr", "Ports": [port]},
    }
    digest = hashlib.sha256(json.dumps(made, sort_keys=True).encode()).hexdigest()[:12]
    return {**made, "labels": {**labels, "lbscaler.config": digest}, "update_config": UPDATE}


def state(service: Message | None, wanted: Message) -> BalancerState:
    """What the service is, compared with what it is to be made from."""
    if service is None:
        return BalancerState.MISSING
    if service["Spec"]["Labels"].get("lbscaler.config") != wanted["labels"]["lbscaler.config"]:
        return BalancerState.OUTDATED
    return BalancerState.RUNNING


def running(tasks: Iterable[Message], lost_nodes: Iterable[str]) -> list[Message]:
    """The balancers that run, on nodes that are not down."""
    lost = set(lost_nodes)
    return [t for t in tasks if t["Status"]["State"] in ("starting", "running") and t.get("NodeID") not in lost]


def report_name(task: Message) -> str:
    """The name by which a balancer reports: its host name, which is its container's short id."""
    return str(task["Status"].get("ContainerStatus", {}).get("ContainerID", ""))[:12]


def manager_addresses(nodes: Iterable[Message], own: str, port: int) -> str:
    """Where the balancers may find a manager: on every node that may run one, in a fixed order."""
    addresses = {node["Status"].get("Addr", "") for node in nodes if node["Spec"].get("Role") == "manager"}
    return ",".join(f"{address}:{port}" for address in sorted((addresses | {own}) - NO_ADDRESS))
