"""What a campaign found: a summary for the terminal, and docs/resilience.md from stored results."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from chaos.fault import SWARM, Fault
from chaos.table import FAULTS, MISSING, OPEN, of_path
from checkout import ROOT

PAGE = ROOT / "docs" / "resilience.md"
Result = dict[str, Any]
HEAD = ["fault", "times", "requests meanwhile", "failed", "explained", "longest recovery"]


def summary(result: Result) -> str:
    """Some lines; the last one repeats the run if something was violated."""
    count = sum(len(names) for names in result["injected"])
    what = f"{count} faults in {len(result['injected'])} rounds"
    if result["soak"]:
        fewest, most = result["backends"]
        what = f"{result['soak']} load, {fewest} to {most} backends"
    lines = [
        f"{what}, {result['requests']} requests, {result['failed']} failed, {result['explained']} of them explained"
    ]
    lines += [f"VIOLATED {sentence}" for sentence in result["violations"]]
    if result["violations"]:
        lines.append(f"again: {command(result)}")
    return "\n".join(lines)


def command(result: Result) -> str:
    kind = "--swarm" if result["datapath"] == SWARM else f"--datapath {result['datapath']}"
    return (
        f"sudo tests/chaos/run.sh --seed {result['seed']} --minutes {result['minutes']:g} {kind}"
        + (f" --soak {result['soak']}" if result["soak"] else "")
        + (f" --faults '{result['faults']}'" if result.get("faults") else "")
    )


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])


def costs(result: Result) -> str:
    rows = []
    for name, cost in sorted(result["costs"].items()):
        failed = str(cost["failed"])
        if cost["outcomes"]:
            failed += " (" + ", ".join(f"{count} {why}" for why, count in sorted(cost["outcomes"].items())) + ")"
        numbers = [str(cost["times"]), str(cost["requests"]), failed, str(cost["explained"])]
        rows.append([name, *numbers, f"{cost['recovery']:.1f} s"])
    return table(HEAD, rows)


def heading(result: Result) -> str:
    path = "Swarm" if result["datapath"] == SWARM else f"{result['datapath'].capitalize()} path"
    return f"## {path}, {result['soak']} load without faults" if result["soak"] else f"## {path}, seed {result['seed']}"


def run_section(result: Result) -> str:
    machine = result["machine"]
    versions = f"kernel {machine['kernel']}, Docker {machine['Docker']}, {machine['iptables']}"
    parts = [
        heading(result),
        f"`{command(result)}`\\\n{machine['date']}, commit {machine['commit']}, {machine['processors']} processors, "
        f"{versions}.",
        summary(result).splitlines()[0] + f". Violated invariants: {len(result['violations'])}.",
    ]
    if result["costs"]:
        parts.append(costs(result))
    if result["violations"]:
        parts.append("\n".join(f"- {sentence}" for sentence in result["violations"]))
    return "\n\n".join(parts)


def never_injected(results: Sequence[Result]) -> list[str]:
    injected = {name for result in results for names in result["injected"] for name in names}
    return [fault.name for fault in FAULTS if fault.name not in injected]


def bounds(faults: Sequence[Fault]) -> str:
    return table(["fault", "bound", "reason"], [[fault.name, f"{fault.bound:g} s", fault.why] for fault in faults])


def page(results: Sequence[Result]) -> str:
    missing = [f"- {name}: {why}." for name, why in MISSING.items()]
    never = [f"- {name}: a fault of the campaign, but not in these runs." for name in never_injected(results)]
    parts = [
        INTRODUCTION.strip(),
        *(run_section(result) for result in results),
        "## What each fault may cost",
        "The bound is the time from the end of the fault until all invariants hold again. The reason says which\n"
        "failed requests it explains, or why there must be none.",
        bounds([fault for fault in FAULTS if SWARM not in fault.datapaths]),
        "In a Swarm. While a node is cut off, lost, without its engine or drained, all others have to be complete\n"
        "within the same bound.",
        bounds(of_path(SWARM)),
        "## Open",
        "\n".join(f"- {sentence}" for sentence in OPEN),
        "## What these runs do not show",
        "\n".join([*never, *missing]),
    ]
    return "\n\n".join(parts) + "\n"


INTRODUCTION = """
# Resilience

What a campaign of faults found on a live system under load. `tests/chaos/run.sh --report` writes this page from stored
results.

The campaign makes a host of its own: a network namespace with its own engine. The clients are in another namespace.
Every second they open 40 connections with one request, 2 with eight requests, and one with a download of three seconds,
whatever the answers (open loop). Faults come in random order from a seed, alone and in pairs. After each one, these
invariants are checked from outside, by code that shares nothing with the product:

- The number of backends is the desired one. No container is left over or exists twice. One manager and one supervisor
  run.
- The rules, the sets and what dispatch can reach contain the fleet's backends and no others.
- Counters of connections do not fall, except after a restart of the balancer or of its rules.
- Every healthy backend gets a share of the new connections.
- A request may fail only for a reason that the fault's row below gives.
- Containers, networks, rules and sets of others stay as they are, and after stop.sh nothing of the project is left.
- Memory and file descriptors of the manager and the balancer's client do not grow.

In a Swarm there are three such hosts, the nodes. Each has an engine and clients of its own, which open half as many
connections. Each invariant is checked on every node, for its own balancer and its own clients. The containers are those
of the services' tasks.
"""


def write(results: Sequence[Result]) -> None:
    PAGE.write_text(page(results))
