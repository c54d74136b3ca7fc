"""The project's systemd unit: it runs the supervisor, restarts it whenever it ends, and restricts what it may do.

The unit is a file in RUNTIME, which a reboot empties, or in BOOT after `run.sh --at-boot`. It has no settings, because
every user may read it: the supervisor reads them from run/<project>/environment. This module uses the standard library
only, because the flags are checked before the virtual environment exists.
"""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

from cli.output import Output
from core.settings import ROOT

RUNTIME = Path("/run/systemd/system")  # exists if systemd is the init of this host
BOOT = Path("/etc/systemd/system")
# The manager needs no right that Docker's socket does not give. So these settings limit mistakes, not an attacker.
# No PrivateTmp: the checkout may be in /tmp, which is read-only here. The checkout may belong to another user than
# root, hence CAP_DAC_OVERRIDE; --manager-port may be below 1024, hence CAP_NET_BIND_SERVICE. The first command has full
# privileges (+): it adds the host's rules, which a reboot has removed. If it fails, the rest works without (-).
UNIT = """\
[Unit]
Description=Load balancer {project}: the manager
After=docker.service
Wants=docker.service
ConditionPathExists={root}/run/{project}/environment
StartLimitIntervalSec=0

[Service]
WorkingDirectory={root}
ExecStartPre=+-bash -c '. run/{project}/environment; PYTHONPATH=manager .venv/bin/python -m cli.network {project}'
ExecStart=bash manager/supervise.sh --project {project}
Restart=always
RestartSec=2
RestartPreventExitStatus=2 4
ReadWritePaths="{quoted_root}/run"
CapabilityBoundingSet=CAP_DAC_OVERRIDE CAP_NET_BIND_SERVICE
LockPersonality=yes
MemoryDenyWriteExecute=yes
NoNewPrivileges=yes
PrivateDevices=yes
ProtectClock=yes
ProtectControlGroups=yes
ProtectHostname=yes
ProtectKernelLogs=yes
ProtectKernelModules=yes
ProtectKernelTunables=yes
ProtectSystem=strict
RestrictAddressFamilies=AF_INET AF_INET6 AF_UNIX
RestrictNamespaces=yes
RestrictRealtime=yes
RestrictSUIDSGID=yes
SystemCallArchitectures=native
SystemCallFilter=@system-service

[Install]
WantedBy=multi-user.target
"""


def name(project: str) -> str:
    return f"lbscaler-{project}.service"


def usable() -> bool:
    """Whether systemd can run the manager. It starts programs in its own network namespace, and as root."""
    if os.geteuid() or not RUNTIME.is_dir():
        return False
    # Each network namespace has a file of its own with this name. Unlike ns/net, it needs no right to trace process 1.
    return Path("/proc/self/net/dev").samefile("/proc/1/net/dev")


def text(project: str) -> str:
    root = str(ROOT).replace("%", "%%")
    quoted_root = root.replace("\\", "\\\\").replace('"', '\\"')
    return UNIT.format(project=project, root=root, quoted_root=quoted_root)


def install(project: str, verb: str, out: Output) -> None:
    """Writes the unit, then runs `systemctl VERB`, which is start or enable. Raises Failed or OSError."""
    at_boot = verb == "enable" or (BOOT / name(project)).exists()
    ((BOOT if at_boot else RUNTIME) / name(project)).write_text(text(project))
    for words in (["daemon-reload"], [verb, name(project)]):
        out.run("systemctl", *words)


def is_installed(project: str) -> bool:
    return any((folder / name(project)).exists() for folder in (BOOT, RUNTIME))


def stop(project: str) -> None:
    if RUNTIME.is_dir():
        _try("stop", name(project))


def remove(project: str) -> None:
    if is_installed(project):
        _try("disable", name(project))
        for folder in (BOOT, RUNTIME):
            (folder / name(project)).unlink(missing_ok=True)
        _try("daemon-reload")
        _try("reset-failed", name(project))


def _try(*words: str) -> None:
    subprocess.run(["systemctl", *words], capture_output=True, check=False)
