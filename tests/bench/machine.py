"""The machine and the versions that a result belongs to."""

from __future__ import annotations

import os
import platform
import re
import time
from pathlib import Path

from bench.host import BenchError, docker, run
from bench.product import ROOT


def describe(image: str, rounds: int, seconds: float) -> dict[str, str | int | float]:
    """`image` is the bench's, which has the proxies and the programs that make the load."""
    command = ("--rm", "--network", "none", "--entrypoint", "sh", image, "-c", PRINT_VERSIONS)
    text = docker("run", *command)
    memory = int(_first(r"MemTotal:\s*(\d+)", Path("/proc/meminfo").read_text())) / 2**20
    return {
        "date": time.strftime("%Y-%m-%d %H:%M"),
        "commit": _commit(),
        "rounds": rounds,
        "seconds": seconds,
        "processors": os.cpu_count() or 0,
        "model": _first(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text()),
        "memory": f"{memory:.0f} GB",
        "kernel": platform.release(),
        "Docker": docker("version", "-f", "{{.Server.Version}}"),
        "iptables": run("iptables", "--version"),
        "bridge netfilter": _bridge_netfilter(),
        "HAProxy": _first(r"HAProxy version ([^ ]*)", text),
        "nginx": _first(r"nginx/([\d.]*)", text),
        "wrk": _first(r"wrk ([^ ]*) ", text),
    }


PRINT_VERSIONS = "haproxy -v; nginx -v 2>&1; wrk -v | head -n 1"


def _commit() -> str:
    try:
        return run("git", "-C", str(ROOT), "describe", "--always", "--dirty")
    except BenchError:  # a copy without its history
        return ""


def _first(pattern: str, text: str) -> str:
    found = re.search(pattern, text)
    return found[1].strip() if found else ""


def _bridge_netfilter() -> str:
    setting = Path("/proc/sys/net/bridge/bridge-nf-call-iptables")
    return "on" if setting.exists() and setting.read_text().strip() == "1" else "off"
