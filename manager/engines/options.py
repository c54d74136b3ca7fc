"""The options of backends and balancers for both engines: least privilege, kernel settings, limits. Pure."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from core.backend_files import UNPRIVILEGED_UID, secret_files
from core.settings import Settings, chain_prefix

FIRST_PORT = 8000  # of the service, in the balancer's own network namespace; its other ports follow
HTTP_ADDRESS = "127.0.0.2"  # of the balancer's HTTP interface on the host; the manager has the port at 127.0.0.1
PIDS = 128  # processes and threads of one backend
UNLIMITED = -1
UNPRIVILEGED_USER = f"{UNPRIVILEGED_UID}:{UNPRIVILEGED_UID}"

# tcp_max_tw_buckets: all clients share the balancer's address, so a port is used again while the backend still keeps
# the old connection in TIME_WAIT (one minute). The other client's timestamps can make the backend take the new SYN for
# an old packet: at 2,000 connections/s per backend, throughput fell to a third. Above this small limit, the kernel ends
# TIME_WAIT immediately.
# ip_unprivileged_port_start: a user who is not root may listen on any port of the container's own namespace.
SYSCTLS = {"net.ipv4.tcp_max_tw_buckets": "1024", "net.ipv4.ip_unprivileged_port_start": "0"}

BALANCER_CAPABILITIES = ["NET_ADMIN", "NET_RAW"]
BALANCER_MEMORY = 512 << 20  # bytes
BALANCER_PIDS = 256
BALANCER_SYSCTLS = {
    "net.ipv4.ip_forward": "1",
    # The ports of the balancer's own connections, so that its rules can exclude them from connection tracking.
    "net.ipv4.ip_local_port_range": "60000 65535",
    "net.ipv4.conf.all.send_redirects": "0",
    "net.ipv4.conf.default.send_redirects": "0",
    # Count packets, so that a refused SYN can be retried with another backend.
    "net.netfilter.nf_conntrack_acct": "1",
    # Keep open connections as long as kube-proxy does (a day), closed ones for 10 s.
    "net.netfilter.nf_conntrack_tcp_timeout_established": "86400",
    "net.netfilter.nf_conntrack_tcp_timeout_time_wait": "10",
    # Do not track a connection whose beginning was not seen.
    "net.netfilter.nf_conntrack_tcp_loose": "0",
    # Let packets outside the window pass. Otherwise the kernel would answer them with a reset.
    "net.netfilter.nf_conntrack_tcp_be_liberal": "1",
}


def labels(project: str, role: str) -> dict[str, str]:
    """The labels that mark a container or service as the project's. `role`: backend or balancer."""
    return {"lbscaler.project": project, "lbscaler.role": role}


def config_digest(config: Mapping[str, Any]) -> str:
    """A short hash. As a balancer's label, it shows whether the balancer was created from the current settings."""
    return hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()[:12]


@dataclass(frozen=True)
class BalancerOptions:
    """What a balancer needs beside the settings. `secrets` are the names of two Swarm secrets: token, certificate."""

    image: str
    secrets: tuple[str, ...] = ()


def published_ports(settings: Settings) -> list[tuple[int, int]]:
    """For each port of the service: the port on the host, and that in the balancer's own network namespace."""
    return [(port, FIRST_PORT + number) for number, (port, _) in enumerate(settings.ports)]


def own_path(settings: Settings) -> dict[str, str]:
    """The balancer's environment variables for rules in its own network namespace."""
    pairs = zip(published_ports(settings), settings.ports, strict=True)
    ports = [f"{own}:{backend_port}" for (_, own), (_, backend_port) in pairs]
    return {"LB_PORTS": ",".join(ports), "LB_STICKY": str(settings.sticky)}


def host_path(settings: Settings, bridge: str, subnet: str) -> dict[str, str]:
    """The balancer's environment variables for rules in the host's network namespace. `bridge` is the interface of the
    backends' network, `subnet` its addresses in CIDR notation."""
    return {
        "LB_PORTS": ",".join(f"{port}:{backend_port}" for port, backend_port in settings.ports),
        "LB_STICKY": str(settings.sticky),
        "LB_PREFIX": chain_prefix(settings.project),
        "LB_BRIDGE": bridge,
        "LB_SUBNET": subnet,
        "LB_ADDRESS": "" if settings.bind == "0.0.0.0" else settings.bind,
        "LB_HTTP": f"{HTTP_ADDRESS}:{settings.manager_port}",
    }


def backend_options(settings: Settings, image_user: str) -> dict[str, Any]:
    """All options of a backend except its image, as keyword arguments of the SDK's `containers.create`, and two more:
    `attach`, the names of networks, and `env_file`, files whose values are not part of the options.

    Each rule of least privilege holds unless `settings.allow` names it.
    """
    allowed = settings.allow
    image_runs_as_root = image_user.split(":", 1)[0] in ("", "root", "0")
    change_user = image_runs_as_root and "root" not in allowed
    # If the image has a directory at the path of a tmpfs, runc ignores the mode, but it sets the owner.
    owner = f",uid={UNPRIVILEGED_UID},gid={UNPRIVILEGED_UID}" if change_user else ""
    temporary = settings.tmpfs if "tmp" in allowed else ("/tmp", *settings.tmpfs)  # noqa: S108 - inside the container
    return {
        "command": list(settings.command) or None,
        "environment": list(settings.env),
        "user": UNPRIVILEGED_USER if change_user else None,
        "cap_drop": None if "capabilities" in allowed else ["ALL"],
        "security_opt": None if "privileges" in allowed else ["no-new-privileges"],
        "read_only": "write" not in allowed,
        "tmpfs": dict.fromkeys(temporary, f"mode=1777{owner}"),
        "volumes": [_with_mode(volume) for volume in settings.volume],
        "mem_limit": settings.memory,
        "nano_cpus": round(settings.cpus * 1e9) if settings.cpus else None,
        "pids_limit": UNLIMITED if "processes" in allowed else PIDS,
        "ulimits": [_ulimit(settings.ulimit)] if settings.ulimit else [],
        "extra_hosts": list(settings.add_host),
        "labels": dict(label.split("=", 1) for label in settings.label),
        "env_file": list(settings.env_file),
        "attach": list(settings.attach),
    }


def secret_mounts(settings: Settings) -> list[str]:
    """The files of --secret as volumes. In a Swarm they are secrets of the Swarm instead."""
    return [f"{path}:/run/secrets/{name}:ro" for name, path in secret_files(settings).items()]


def _ulimit(limit: str) -> dict[str, Any]:
    """A limit, NAME=NUMBER, as the Engine API describes it."""
    name, _, number = limit.partition("=")
    return {"Name": name, "Soft": int(number), "Hard": int(number)}


def _with_mode(volume: str) -> str:
    """A volume is read-only unless it is given with `:rw`."""
    return volume if volume.endswith((":ro", ":rw")) else f"{volume}:ro"
