"""Runs iptables, ipset, conntrack and ip: the only place that does. Argument lists, never a shell.

Reads return the tool's own text, for `ruleset` to parse. A tool that fails raises NetfilterError with its words and,
for a restore, the numbered lines it was given; only a lock held by another program (exit code 4) is tried again.
"""

from __future__ import annotations

import subprocess
import time
from collections.abc import Collection, Sequence
from pathlib import Path

from ruleset import SET

LOCKED, TRIES = 4, 5
TIMEOUT = 30  # seconds


class NetfilterError(Exception):
    """A tool ended with an error; the message says which, why, and what it was given."""


def run(argv: Sequence[str], text: str = "", accept: Sequence[int] = (0,)) -> str:
    """The standard output of `argv` fed with `text`. Exit codes in `accept` are fine, any other raises."""
    for attempt in range(TRIES):
        if attempt:
            time.sleep(0.05 * 2**attempt)
        try:
            done = subprocess.run(argv, input=text, capture_output=True, text=True, timeout=TIMEOUT, check=False)
        except subprocess.TimeoutExpired:
            raise NetfilterError(f"{' '.join(argv)}: no end after {TIMEOUT} s") from None
        if done.returncode in accept:
            return done.stdout
        if done.returncode != LOCKED:
            break
    numbered = "".join(f"\n{number:5} {line}" for number, line in enumerate(text.splitlines(), 1))
    raise NetfilterError(f"{' '.join(argv)}: exit code {done.returncode}: {done.stderr.strip()}{numbered}")


class Netfilter:
    """This network namespace's tables, set and flows, through the `nft` or the `legacy` flavour of iptables."""

    def __init__(self, flavour: str) -> None:
        self._restore = f"iptables-{flavour}-restore"
        self._save = f"iptables-{flavour}-save"

    def table(self, name: str) -> str:
        return run([self._save, "-c", "-t", name])

    def apply(self, text: str) -> None:
        if text:
            run([self._restore, "--noflush", "-w", "5"], text)

    def members(self) -> str:
        """The set's listing; makes the set when it is not there."""
        run(["ipset", "create", SET, "hash:ip", "family", "inet", "counters", "-exist"])
        return run(["ipset", "save", SET])

    def change_members(self, text: str) -> None:
        if text:
            run(["ipset", "restore", "-exist"], text)

    def flows(self) -> str:
        return run(["conntrack", "-L", "-p", "tcp", "--dst-nat"], accept=(0, 1))

    def forget_flows(self, ip: str, unanswered_only: bool = False) -> None:
        state = ["--state", "SYN_SENT"] if unanswered_only else []
        run(["conntrack", "-D", "-p", "tcp", *state, "--reply-src", ip], accept=(0, 1))  # 1: there were none

    def forget_neighbours(self, ips: Collection[str]) -> None:
        if ips:
            run(["ip", "-batch", "-"], "".join(f"neigh flush to {ip}\n" for ip in ips))

    def conntrack_use(self) -> tuple[int, int]:
        """(entries in the connection table, how many it can hold)."""
        proc = Path("/proc/sys/net/netfilter")
        return int((proc / "nf_conntrack_count").read_text()), int((proc / "nf_conntrack_max").read_text())
