"""Turns the wanted content of a table into `iptables-restore` text that changes only what differs. Pure.

Rules have the form that `iptables-save` prints, so a comparison of strings finds every change by another program.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile

from listings import Listing

Rules = tuple[str, ...]
Chains = dict[str, Rules]


@dataclass(frozen=True)
class Table:
    """The wanted content of one table: the project's chains, whose names begin with `prefix`, and the rules that lead
    from built-in chains into them (hooks)."""

    name: str
    chains: Chains
    hooks: Mapping[str, Rules]
    prefix: str = "LB-"


def restore(table: Table, actual: Listing) -> str:
    """The text that changes `actual` into `table` in one atomic step; empty if they are equal."""
    changed = [chain for chain, rules in table.chains.items() if actual.chains.get(chain) != rules]
    stale = [chain for chain in actual.chains if chain.startswith(table.prefix) and chain not in table.chains]
    hooks: list[str] = []
    for chain, rules in table.hooks.items():
        hooks += _hook_changes(chain, rules, actual.chains.get(chain, ()), table.prefix)
    if not (changed or stale or hooks):
        return ""
    lines = [f"*{table.name}"]
    # With --noflush, this line creates the chain, or empties it if it exists.
    for chain in (*changed, *stale):
        lines.append(f":{chain} - [0:0]")
    for chain in changed:
        for rule in table.chains[chain]:
            lines.append(f"-A {chain} {rule}")
    lines += hooks
    # Last, because a chain can be deleted only when no rule leads to it.
    for chain in stale:
        lines.append(f"-X {chain}")
    return "\n".join([*lines, "COMMIT", ""])


def removal(name: str, actual: Listing, prefix: str) -> str:
    """The text that removes the project's chains and hooks from a table; empty if there are none."""
    return restore(Table(name, {}, dict.fromkeys(actual.policies, ()), prefix), actual)


def _hook_changes(chain: str, wanted: Rules, actual: Rules, prefix: str) -> list[str]:
    """The deletions and insertions that put `wanted` in its place in a built-in chain; empty when it is there.

    Its place is the first one, or the first one after Docker's hook for its users' own rules. Rules that match none of
    our packets may be before it.
    """
    ours = tuple(rule for rule in actual if is_ours(rule, prefix))
    behind_docker = actual[_after_docker_user(actual) :]
    top = takewhile(lambda rule: is_ours(rule, prefix) or _matches_others(rule), behind_docker)
    in_place = tuple(rule for rule in top if is_ours(rule, prefix))
    if in_place == wanted == ours:
        return []
    # Also deletes duplicates, and hooks of an earlier version.
    deletions = [f"-D {chain} {rule}" for rule in ours]
    first = 1 + _after_docker_user([rule for rule in actual if not is_ours(rule, prefix)])
    return deletions + [f"-I {chain} {place} {rule}" for place, rule in enumerate(wanted, first)]


def _after_docker_user(rules: Sequence[str]) -> int:
    """The index behind the rule that leads to DOCKER-USER, where users put their own rules; 0 if there is none."""
    return max((index for index, rule in enumerate(rules, 1) if target_of(rule) == "DOCKER-USER"), default=0)


def _matches_others(rule: str) -> bool:
    """Docker's rules for its DNS, and the hooks of other projects. If all projects wanted the first place, each would
    move its hook again and again."""
    return is_dockers(rule) or target_of(rule).startswith("LB-")


def is_ours(rule: str, prefix: str) -> bool:
    return target_of(rule).startswith(prefix)


def is_dockers(rule: str) -> bool:
    """Whether Docker wrote the rule: it keeps some in a container's nat table, for its DNS."""
    return target_of(rule).startswith("DOCKER_")


def target_of(rule: str) -> str:
    """The rule's target; empty for a rule that only counts."""
    match = re.search(r"(?:^| )-[jg] (\S+)", rule)
    return match[1] if match else ""


def set_changes(wanted: Iterable[str], present: Iterable[str], name: str) -> str:
    """`ipset restore` text. Adds no present member again, which would zero its counters."""
    wanted, present, lines = set(wanted), set(present), ""
    for ip in sorted(wanted - present):
        lines += f"add {name} {ip}\n"
    for ip in sorted(present - wanted):
        lines += f"del {name} {ip}\n"
    return lines
