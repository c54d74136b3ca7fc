"""What backends and the balancer are created from, on either engine: least privilege, kernel settings, limits. Pure."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from core.settings import Settings

PIDS = 128
STRANGER = "10001:10001"  # who an image runs as that names nobody but root
# All clients share the balancer's address, so a port comes back within the minute a closed connection stays in
# TIME_WAIT, and with another client's timestamps a backend takes the new SYN for an old one: at 2,000 connections/s a
# backend, throughput fell to a third. With few such places the kernel forgets closed connections at once.
# A stranger may listen on any port: inside its own namespace that takes nothing from anybody.
SYSCTLS = {"net.ipv4.tcp_max_tw_buckets": "1024", "net.ipv4.ip_unprivileged_port_start": "0"}

# What a program logs when a rule of least privilege stops it → the flag that lifts this rule.
HINTS = (
    ("read-only file system", "it writes where it may not: give it the place with --tmpfs PATH, or --allow write"),
    ("permission denied", "it wants to be who its image says, or more: --allow root, then --allow capabilities"),
    ("operation not permitted", "it wants what only root may: --allow root, then --allow capabilities"),
    ("must be root", "--allow root"),
    ("cannot allocate memory", "more memory: --memory"),
)
# Lines that report no reason to end: low levels, and nginx's alert that it may not raise its own limit.
HARMLESS = re.compile(r"\b(debug|info|notice)\b|setrlimit\(")
ERROR = re.compile(r"\b(error|emerg|emergency|crit|critical|fatal|panic)\b")  # a line that reports why a program ends
STOPPED_FROM_OUTSIDE = (128 + 9, 128 + 15)  # exit codes after SIGKILL and SIGTERM


# The balancer's kernel settings. Conntrack counts packets, so that a refused SYN can be retried elsewhere. It keeps
# open connections as long as kube-proxy does and closed ones for 10 s, makes no entry for a connection that it has not
# seen begin, and lets packets outside the window pass, for the kernel would answer them with a reset. The balancer's
# own connections have local ports of their own, so that they need not be tracked.
BALANCER_SYSCTLS = {
    "net.ipv4.ip_forward": "1",
    "net.ipv4.ip_local_port_range": "60000 65535",
    "net.ipv4.conf.all.send_redirects": "0",
    "net.ipv4.conf.default.send_redirects": "0",
    "net.netfilter.nf_conntrack_acct": "1",
    "net.netfilter.nf_conntrack_tcp_timeout_established": "86400",
    "net.netfilter.nf_conntrack_tcp_timeout_time_wait": "10",
    "net.netfilter.nf_conntrack_tcp_loose": "0",
    "net.netfilter.nf_conntrack_tcp_be_liberal": "1",
}
BALANCER_CAPABILITIES = ["NET_ADMIN", "NET_RAW"]
BALANCER_MEMORY = 512 << 20  # bytes
BALANCER_PIDS = 256


@dataclass(frozen=True)
class BalancerOptions:
    """What the settings do not hold of what a balancer is made from. `secrets` are names of a Swarm's secrets: the
    token's and the certificate's."""

    image: str
    token: str
    manager: str = ""  # ADDRESS:PORT, or several with commas, where the balancers find the manager
    secrets: tuple[str, ...] = ()


def ended_by_itself(exit_code: int) -> bool:
    """Whether a container that ended with this code failed by itself: it was not stopped or killed from outside."""
    return exit_code not in (0, *STOPPED_FROM_OUTSIDE)


def advice(log_lines: str, exit_code: int | None, out_of_memory: bool = False) -> str:
    """The setting that would help a backend; empty where none is known to.

    `log_lines` is the end of its log, `exit_code` is None while its container runs. Only a container that ended by
    itself with an error gets a hint: in any other, an error in the log did not end it. The last line that reports an
    error decides, because a program goes on after the errors before it.
    """
    if out_of_memory:
        return "the kernel killed it for its memory: raise --memory"
    if exit_code is None or not ended_by_itself(exit_code):
        return ""
    for line in reversed(log_lines.lower().splitlines()):
        if HARMLESS.search(line):
            continue
        hint = next((hint for complaint, hint in HINTS if complaint in line), "")
        if hint or ERROR.search(line):
            return hint
    return ""


def options(settings: Settings, image_user: str) -> dict[str, Any]:
    """Everything but the image that a backend is created with: least privilege, less what --allow names."""
    allowed = settings.allow
    root = image_user.split(":", 1)[0] in ("", "root", "0")
    stranger = root and "root" not in allowed
    # runc gives a tmpfs the mode of the directory below it, whatever it is told, but takes an owner.
    place = "mode=1777" + (",uid={},gid={}".format(*STRANGER.split(":")) if stranger else "")
    return {
        "command": list(settings.command) or None,
        "environment": list(settings.env),
        "user": STRANGER if stranger else None,
        "cap_drop": None if "capabilities" in allowed else ["ALL"],
        "security_opt": None if "privileges" in allowed else ["no-new-privileges"],
        "read_only": "write" not in allowed,
        "tmpfs": dict.fromkeys(("/tmp", *settings.tmpfs), place),  # noqa: S108 - inside the container
        "volumes": [v if v.endswith((":ro", ":rw")) else f"{v}:ro" for v in settings.volume],
        "mem_limit": settings.memory,
        "nano_cpus": round(settings.cpus * 1e9) if settings.cpus else None,
    }
