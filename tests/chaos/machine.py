"""The machine and the versions that a result belongs to."""

from __future__ import annotations

import os
import platform
import subprocess
import time

from chaos.site import Site, call
from checkout import ROOT
from swarm.cluster import Node


def describe(site: Site | Node) -> dict[str, str | int]:
    """`date` and `commit` are those of the call."""
    commit = subprocess.run(
        ["git", "-C", str(ROOT), "describe", "--always"], capture_output=True, text=True, check=False
    )
    return {
        "date": time.strftime("%Y-%m-%d %H:%M"),
        "commit": commit.stdout.strip(),
        "processors": os.cpu_count() or 0,
        "kernel": platform.release(),
        "Docker": site.docker("version", "-f", "{{.Server.Version}}"),
        "iptables": call("iptables", "--version"),
    }
