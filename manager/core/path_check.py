"""The manager's own test of the data path: a connection through the balancer's address, every few seconds.

Probes go from the balancer to the backends, so they do not notice a firewall rule, a switched-off IP forwarding or a
redirection that stops the clients. This check takes the clients' way: an engine makes the connections
(`Engine.check_path`). Pure.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from core.load import Finding

PERIOD = 5.0  # seconds between checks
FAILURES = 2  # checks in a row that have to fail
_SENTENCES = {
    "ip_forward_off": "IP forwarding is off in the balancer's namespace",
    "forward_policy_drop": "the policy of the balancer's FORWARD chain is DROP",
    "foreign_rule": "a foreign rule stands in the way",
}
REPAIRABLE = frozenset({"ip_forward_off"})  # what a new balancer container puts right


@dataclass
class PathCheck:
    """`working` is None before the first check. While it is False, `target`, `error` and `found` say what is wrong."""

    failures: int = 0
    working: bool | None = None
    target: str = ""
    error: str = ""
    found: str = ""

    @property
    def problem(self) -> str:
        """One sentence while the path is broken, else empty."""
        if self.working is not False:
            return ""
        return f"connections through the balancer at {self.target} fail: {self.error}; found: {self.found}"

    def passed(self) -> None:
        self.failures, self.working = 0, True

    def failed(self, target: str, error: str, findings: Sequence[Finding]) -> None:
        self.failures += 1
        if self.failures < FAILURES:
            return
        sentences = [_sentence(finding) for finding in findings]
        nothing = "nothing wrong in the balancer's namespace: look at the host's firewall and routes"
        self.target, self.error, self.found = target, error, "; ".join(sentences) or nothing
        self.working = False


def _sentence(finding: Finding) -> str:
    sentence = _SENTENCES.get(finding.kind, finding.kind)
    return f"{sentence}: {finding.detail}" if finding.detail else sentence
