"""The machine and the versions that a result belongs to."""

from __future__ import annotations

import os
import platform
import subprocess
import time

from chaos.site import call
from checkout import ROOT


def describe() -> dict[str, str | int]:
    commit = subprocess.run(
        ["git", "-C", str(ROOT), "describe", "--always"], capture_output=True, text=True, check=False
    )
    return {
        "date": time.strftime("%Y-%m-%d %H:%M"),
        "commit": commit.stdout.strip(),
        "processors": os.cpu_count() or 0,
        "kernel": platform.release(),
        "Docker": call("docker", "version", "-f", "{{.Server.Version}}"),
        "iptables": call("iptables", "--version"),
    }
