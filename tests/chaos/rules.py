"""Faults of the firewall, the kernel's settings and the host's networks, where the product's rules are."""

from __future__ import annotations

import re
import sys
from contextlib import suppress
from pathlib import Path

from chaos.allowances import new_until_repaired, nothing, outage
from chaos.fault import Fault, Injected, Stage
from chaos.observe import rules_of
from chaos.product import PORT
from chaos.site import SiteError, call

NOWHERE = "198.18.255.254:9"  # of the test network; no host has it
TABLE_PART, TABLE_SECONDS = 0.97, 15  # of the limit of connections, and how long
NETWORKS = 100  # created while the campaign runs
SUBNETS = "198.19.{}.{}/28"


def flavour(stage: Stage) -> str:
    """The program whose rules are the product's."""
    legacy = call(*stage.product.rules_namespace(), "iptables-legacy-save")
    return "iptables-legacy" if "LB-" in legacy else "iptables-nft"


def flush(stage: Stage) -> Injected:
    """Flushes all chains of the product in both tables."""
    program = flavour(stage)
    saved = call(*stage.product.rules_namespace(), f"{program}-save")
    for table in ("nat", "filter"):
        part = saved.partition(f"*{table}\n")[2].partition("COMMIT")[0]
        chains = re.findall(r"^:(LB-\S+) ", part, re.MULTILINE)
        text = "".join([f"*{table}\n", *(f"-F {chain}\n" for chain in chains), "COMMIT\n"])
        call(*stage.product.rules_namespace(), f"{program}-restore", "--noflush", "-w", "5", text=text)
    return Injected()


def rule(stage: Stage, table: str, insert: list[str], words: list[str]) -> Injected:
    """Adds a foreign rule; the undo deletes it."""
    program = [flavour(stage), "-w", "5", "-t", table]
    place = stage.product.rules_namespace()
    call(*place, *program, *insert, *words)

    def undo() -> None:
        with suppress(SiteError):  # the balancer's namespace has ended, and the rule with it
            call(*place, *program, "-D", insert[1], *words)

    return Injected([], undo)


def redirect(stage: Stage) -> Injected:
    words = ["-p", "tcp", "--dport", str(PORT), "-j", "DNAT", "--to-destination", NOWHERE]
    return rule(stage, "nat", ["-I", "PREROUTING", "1"], words)


def drop_before(stage: Stage) -> Injected:
    return rule(stage, "filter", ["-I", "FORWARD", "1"], ["-p", "tcp", "-j", "DROP"])


def drop_after(stage: Stage) -> Injected:
    words = ["-p", "tcp", "--dport", "9", "-j", "DROP"]
    return rule(stage, "filter", ["-A", "FORWARD"], words)


def policy(stage: Stage) -> Injected:
    program, place = flavour(stage), stage.product.rules_namespace()
    before = "DROP" if ":FORWARD DROP" in rules_of(stage.product.rules_namespace) else "ACCEPT"
    call(*place, program, "-w", "5", "-P", "FORWARD", "DROP")

    def undo() -> None:
        with suppress(SiteError):
            call(*place, program, "-w", "5", "-P", "FORWARD", before)

    return Injected([], undo)


def forwarding(stage: Stage) -> Injected:
    """In the balancer's namespace the product turns it on again; on the host that is up to the operator."""
    stage.in_rules("sysctl", "-qw", "net.ipv4.ip_forward=0")
    if stage.product.datapath == "bridge":
        return Injected()
    return Injected([], lambda: stage.in_rules("sysctl", "-qw", "net.ipv4.ip_forward=1"))


def fill_connection_table(stage: Stage) -> Injected:
    """The entries expire a little later."""
    program = str(Path(__file__).with_name("connections.py"))
    stage.in_rules(sys.executable, program, str(TABLE_PART), str(TABLE_SECONDS))
    return Injected()


def networks(stage: Stage) -> Injected:
    """Creates networks, and removes them again."""
    names = [f"other{number}" for number in range(NETWORKS)]
    for number, name in enumerate(names):
        subnet = SUBNETS.format(number // 16, number % 16 * 16)
        stage.site.docker("network", "create", "--subnet", subnet, name)
    return Injected([], lambda: stage.site.docker("network", "rm", *names))


FAULTS = [
    Fault(
        "flush the project's chains", "rules", flush, new_until_repaired,
        "without its rules a new connection finds a closed port, until the next pass", resets=True,
    ),
    Fault(
        "foreign redirection before ours", "rules", redirect, new_until_repaired,
        "the kernel keeps a connection's translation, so those that began before the repair are lost", hold=5,
    ),
    Fault(
        "foreign DROP in FORWARD", "rules", drop_before, nothing,
        "TCP sends again what was dropped for three seconds", hold=3, bound=45, budget=20,
    ),
    Fault("foreign rule after ours", "rules", drop_after, nothing, "it matches nothing of ours", hold=3),
    Fault(
        "policy DROP of FORWARD", "rules", policy, nothing, "TCP sends again what was dropped for three seconds",
        hold=3, bound=45, budget=20,
    ),
    Fault(
        "IP forwarding off", "rules", forwarding, outage,
        "until a test of the path has failed, one every 5 s; then a new balancer container, without open connections",
        hold=2, bound=30, budget=22,
    ),
    Fault(
        "connection table nearly full", "rules", fill_connection_table, nothing, "there is room for the load's",
        hold=10, budget=24,
    ),
    Fault(
        "100 networks on the host", "host", networks, nothing, "other networks are not ours", alone=True,
        bound=30, budget=75,
    ),
]  # fmt: skip
