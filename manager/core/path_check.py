"""The result of the manager's test of the data path: a connection through the balancer's address every few seconds.
Pure.

Probes go from the balancer to the backends, so they do not notice a firewall rule, disabled IP forwarding or a
redirection that stops the clients. This test uses the clients' path: the engine opens the connections
(`Engine.check_path`).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from core.load import Finding

PERIOD = 5.0  # seconds between tests
MAX_FAILURES = 2  # in a row, until the path counts as broken, if no balancer has found a certain cause
_SENTENCES = {
    "ip_forward_off": "IP forwarding is off in the balancer's namespace",
    "forward_policy_drop": "the policy of the balancer's FORWARD chain is DROP",
    "foreign_rule": "a foreign rule blocks or redirects connections",
}
# Kinds of findings that stop all connections, and that a new balancer container fixes.
REPAIRABLE = frozenset({"ip_forward_off"})


@dataclass
class PathCheck:
    """`working` is None before the first result. While it is False, `target` and `error` are those of the failed
    connection, and `found` is what the balancers found."""

    failures: int = 0
    working: bool | None = None
    target: str = ""
    error: str = ""
    found: str = ""

    @property
    def problem(self) -> str:
        """For people: one sentence while the path is broken, else empty."""
        if self.working is not False:
            return ""
        return f"connections through the balancer at {self.target} fail: {self.error}; found: {self.found}"

    def passed(self) -> None:
        self.failures, self.working = 0, True

    def failed(self, target: str, error: str, findings: Sequence[Finding]) -> None:
        self.failures += 1
        # A single failure may be a lost packet or a backend that has just ended, unless its cause is known.
        if self.failures < MAX_FAILURES and not repairable(findings):
            return
        sentences = [_sentence(finding) for finding in findings]
        # If no balancer found a cause in its namespace, the cause is on the host.
        nothing = "nothing wrong in the balancer's namespace: check the host's firewall and routes"
        self.target, self.error, self.found = target, error, "; ".join(sentences) or nothing
        self.working = False


def repairable(findings: Iterable[Finding]) -> bool:
    """Whether a new balancer container would fix the path."""
    return any(finding.kind in REPAIRABLE for finding in findings)


def _sentence(finding: Finding) -> str:
    sentence = _SENTENCES.get(finding.kind, finding.kind)
    return f"{sentence}: {finding.detail}" if finding.detail else sentence
