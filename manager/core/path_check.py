"""The result of the manager's test of the data path: a connection through the balancer's address every few seconds.
Pure.

Probes go from the balancer to the backends, so they do not notice a firewall rule, disabled IP forwarding or a
redirection that stops the clients. This test uses the clients' path: the engine opens the connections
(`Engine.check_path`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from core.load import Finding

PERIOD = 5.0  # seconds between tests
MAX_FAILURES = 2  # in a row, until the path counts as broken, if no balancer has found a certain cause
FORWARDING_OFF = "ip_forward_off"
_SENTENCES = {
    FORWARDING_OFF: "IP forwarding is off where the balancer's rules are",
    "forward_policy_drop": "the policy of the balancer's FORWARD chain is DROP",
    "foreign_rule": "a foreign rule blocks or redirects connections",
}
# Kinds of findings that stop all connections, and that a new balancer container fixes: its namespace is new, too.
REPAIRABLE = frozenset({FORWARDING_OFF})


@dataclass
class PathCheck:
    """`on_host`: the rules are in the host's namespace, which a new balancer container does not change.

    `working` is None before the first result. While it is False, `target` and `error` are those of the failed
    connection, and `found` is what the balancers found."""

    on_host: bool = False
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

    def take_result(self, errors: Mapping[str, str], findings: Sequence[Finding]) -> None:
        """Takes the result of a test. `errors`: the error of each target, empty if it worked. Without a target, the
        path stays as it was."""
        failed = [(target, error) for target, error in errors.items() if error]
        # On the host, the test's connections are not forwarded, so they work where those of other machines do not.
        if errors and not failed and self.on_host and _has(findings, FORWARDING_OFF):
            failed = [(next(iter(errors)), "the host forwards no packets of other machines")]
        if failed:
            self._failed(*failed[0], findings)
        elif errors:
            self.failures, self.working = 0, True

    def _failed(self, target: str, error: str, findings: Sequence[Finding]) -> None:
        self.failures += 1
        # A single failure may be a lost packet or a backend that has just ended, unless its cause is known.
        if self.failures < MAX_FAILURES and not _has(findings, *REPAIRABLE):
            return
        sentences = [_sentence(finding) for finding in findings]
        # If no balancer found a cause in its namespace, the cause is on the host.
        nothing = "nothing wrong in the balancer's namespace: check the host's firewall and routes"
        self.target, self.error, self.found = target, error, "; ".join(sentences) or nothing
        self.working = False

    def repairable(self, findings: Sequence[Finding]) -> bool:
        """Whether the path is broken and a new balancer container would fix it."""
        return self.working is False and not self.on_host and _has(findings, *REPAIRABLE)


def _has(findings: Sequence[Finding], *kinds: str) -> bool:
    return any(finding.kind in kinds for finding in findings)


def _sentence(finding: Finding) -> str:
    sentence = _SENTENCES.get(finding.kind, finding.kind)
    return f"{sentence}: {finding.detail}" if finding.detail else sentence
