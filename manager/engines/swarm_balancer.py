"""The balancer as a global service of a Swarm: one task on every node, with its port published on that node. Pure.

When settings change, Swarm updates the service, one node at a time. A node's port is free only after its old balancer
has ended, so the node has no balancer for a moment. The other nodes continue to serve.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import starmap

from core.engine import BalancerState
from core.settings import Settings
from engines import options
from engines.options import BalancerOptions
from engines.swarm_services import SECOND, ApiObject, Spec, is_paused, secret_reference
from engines.swarm_tasks import Task

NO_ADDRESS = {"", "0.0.0.0"}  # what a Swarm of one node may report as its own address
SECRET_FILES = ("token", "certificate.pem")  # names in the container, below /run/secrets
STOP_MARGIN = 5  # seconds after the drain timeout, before SIGKILL
UPDATE = {"Parallelism": 1, "Order": "stop-first", "FailureAction": "pause", "Monitor": 5 * SECOND}


def service_spec(settings: Settings, balancer: BalancerOptions, manager: str, secret_ids: Iterable[str]) -> Spec:
    """The service as the Engine API describes it. `manager`: the result of `manager_addresses`."""
    labels = options.labels(settings.project, "balancer")
    ports = []
    for port, own_port in options.published_ports(settings):
        ports.append({"Protocol": "tcp", "TargetPort": own_port, "PublishedPort": port, "PublishMode": "host"})
    spec = {
        "Name": f"{settings.project}-balancer",
        "TaskTemplate": {
            "ContainerSpec": _container(settings, balancer, manager, secret_ids) | {"Labels": labels},
            "Resources": {"Limits": {"MemoryBytes": options.BALANCER_MEMORY, "Pids": options.BALANCER_PIDS}},
            "RestartPolicy": {"Condition": "any", "Delay": SECOND // 2},
            "Placement": {"Constraints": list(settings.balancer_constraint)},
            "Networks": [{"Target": settings.project}],
        },
        "Mode": {"Global": {}},
        "EndpointSpec": {"Mode": "dnsrr", "Ports": ports},
    }
    return {**spec, "Labels": {**labels, "lbscaler.config": options.config_digest(spec)}, "UpdateConfig": UPDATE}


def _container(settings: Settings, balancer: BalancerOptions, manager: str, secret_ids: Iterable[str]) -> Spec:
    drain = int(settings.drain_timeout)
    secrets = zip(secret_ids, balancer.secrets, SECRET_FILES, strict=True)
    return {
        "Image": balancer.image,
        "Env": [
            f"LB_MANAGERS={manager}",
            "LB_NODE={{.Node.ID}}",
            *(f"{name}={value}" for name, value in options.own_path(settings).items()),
            f"LB_LEAVE={drain}",
        ],
        "ReadOnly": True,
        "CapabilityDrop": ["ALL"],
        "CapabilityAdd": [f"CAP_{name}" for name in options.BALANCER_CAPABILITIES],
        "Sysctls": options.BALANCER_SYSCTLS,
        "Mounts": [{"Type": "tmpfs", "Target": "/run"}],
        "StopGracePeriod": (drain + STOP_MARGIN) * SECOND,
        "Secrets": list(starmap(secret_reference, secrets)),
    }


def state(service: ApiObject | None, wanted: Spec, tasks: Iterable[Task]) -> BalancerState:
    """The state of the service, which has to match `wanted`. It is outdated, too, if its update is paused and can be
    resumed: some nodes have a balancer with old settings.

    Swarm pauses an update whose new balancer does not run, and restarts that balancer. Until it runs, a resumed update
    would only end the balancer of another node.
    """
    if service is None:
        return BalancerState.MISSING
    other_settings = service["Spec"]["Labels"].get("lbscaler.config") != wanted["Labels"]["lbscaler.config"]
    can_be_resumed = is_paused(service) and all(task.healthy or task.stopping for task in tasks)
    return BalancerState.OUTDATED if other_settings or can_be_resumed else BalancerState.RUNNING


def report_name(task: Task) -> str:
    """The name under which a balancer reports: its host name, which is the short id of its container."""
    return task.container[:12]


def manager_addresses(nodes: Iterable[ApiObject], own: str, port: int) -> str:
    """The addresses that the balancers try to reach the manager at: all nodes that may run it, in a fixed order."""
    # The order is fixed because the text is part of the service's digest: another order would be an update.
    addresses = {own}
    for node in nodes:
        if node["Spec"].get("Role") == "manager":
            addresses.add(node["Status"].get("Addr", ""))
    return ",".join(f"{address}:{port}" for address in sorted(addresses - NO_ADDRESS))
