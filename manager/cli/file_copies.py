"""Copies the files of --env-file and --secret to run/PROJECT/secrets/, which only this user may enter.

A copy's name is a digest of its content and its owner. So changed content is a changed setting, which replaces the
backends, and a rollback still finds the content from before. The digest needs the project's token: without it, nobody
can test whether a guessed password has the digest that `/status` contains.
"""

from __future__ import annotations

import hashlib
import json
import os
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cli import swarm
from cli.output import Failed
from cli.project import Project, write
from core import backend_files
from core.settings import Settings, variable


def copy_files(project: Project, settings: Settings, image: Any) -> dict[str, str]:
    """Copies the files. Returns the two settings with the copies' paths, as variables for the manager."""
    if not settings.env_file and not settings.secret:
        return {}
    project.secrets_dir.mkdir(mode=0o700, exist_ok=True)
    env_files = [_copy(project, path, os.geteuid()) for path in settings.env_file]
    secrets = []
    for name, path in backend_files.secret_files(settings).items():
        copy = _copy(project, path, _owner(settings, image))
        secrets.append(f"{name}={copy}")
        if settings.orchestrator == "swarm":
            swarm.share_file(project, backend_files.swarm_secret(project.name, copy), copy)
    return {variable("env_file"): shlex.join(env_files), variable("secret"): shlex.join(secrets)}


def _owner(settings: Settings, image: Any) -> int:
    """The user who may read the copy of a secret. Raises Failed."""
    image_user = str(image.attrs["Config"].get("User") or "")
    owner = backend_files.user_id(settings, image_user)
    if owner is None:
        raise Failed(f"--secret: only the image has the number of its user {image_user}; write USER NUMBER")
    if settings.orchestrator == "swarm":
        return os.geteuid()  # Swarm gives each task a file of its own
    if os.geteuid():
        raise Failed("--secret: only root can give files to the backends' user; run as root")
    return owner


def _copy(project: Project, path: str, owner: int) -> str:
    """The path of a copy with this content and owner."""
    content = Path(path).read_bytes()
    name = hashlib.blake2b(content, key=project.token.encode(), digest_size=8).hexdigest()
    copy = project.secrets_dir / f"{name}-{owner}"
    if not copy.exists():
        write(copy, content)
    os.chown(copy, owner, -1)
    copy.chmod(0o400)
    return str(copy)


def remove_unused(project: Project, current: Mapping[str, str]) -> None:
    """Removes the copies that are neither in these variables nor in the spec of a backend, which a rollback may use."""
    if not project.secrets_dir.exists():
        return
    in_use = {Path(path).name for path in shlex.split(" ".join(current.values()))}
    for container in project.docker.api.containers(all=True, filters=project.filter("backend")):
        spec = json.loads(container["Labels"].get("lbscaler.spec", "{}"))
        mounted = [volume.split(":")[0] for volume in spec.get("volumes", ())]
        in_use |= {Path(path).name for path in (*spec.get("env_file", ()), *mounted)}
    services = project.services("backend")
    for service in services:
        in_use |= swarm.files_of(project, service)
    for copy in project.secrets_dir.iterdir():
        if copy.is_file() and copy.name not in in_use:
            copy.unlink()
    if services:
        swarm.remove_files(project, in_use)
