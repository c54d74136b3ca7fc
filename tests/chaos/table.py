"""All faults of the campaign, and those of its aims that it does not have."""

from __future__ import annotations

from chaos import backends, callers, control, rules, swarm_faults
from chaos.fault import Fault

FAULTS: list[Fault] = [*backends.FAULTS, *rules.FAULTS, *control.FAULTS, *callers.faults(), *swarm_faults.FAULTS]

MISSING = {
    "clock jump": "the clock is the machine's, and other programs need it; "
    "tests/unit/test_clock.py shows that the product reads the date only to print or compare dates",
    "delayed link to the manager": "this kernel has no netem; one that loses half of the packets is among the faults",
    "a full connection table, and one with a million entries": "the limit is the machine's; "
    "tests/netns/test_connection_table.py and test_million_flows.py have these cases",
}


# Violations that were seen in earlier runs and are not the product's, or not explained yet.
OPEN = (
    "Bridge path, an earlier hour, stop a backend: one new connection was reset 1.3 s after the SIGTERM. The "
    "campaign's backend closes its listener one second after it, and on a machine with four such systems the balancer "
    "was later.",
    "Swarm, seed 1, a lost node and a killed backend on another one: the node was the Swarm's leader, and the other "
    "node's agent was reporting the backend's end to it. Docker's agent waits for that answer without a deadline. So "
    "the Swarm started no substitute until the lost node returned, 134 s later. The balancers had ejected the backend, "
    "and the manager reported that 5 of 6 serve.",
)


def of_path(datapath: str) -> list[Fault]:
    return [fault for fault in FAULTS if datapath in fault.datapaths]
