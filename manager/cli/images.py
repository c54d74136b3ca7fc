"""Builds the project's images. Each is tagged with a digest of its sources, and is not built again if that tag exists.

`images.py FOLDER...` builds the images that are missing and prints all tags; the benchmark and the tests use it.
"""

from __future__ import annotations

import hashlib
import os
import sys
import tempfile
from collections.abc import Iterable, Mapping
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

from cli.output import Failed, Output, Step
from core.settings import ROOT, SETTINGS

DEFAULT_BASE = SETTINGS["base_image"].default
OWN_BASE = "lbscaler-base:trixie-slim"  # made on this host if DEFAULT_BASE cannot be pulled
RUN_TIME_FILES = ("ip.txt", "hostip.txt")  # run.sh and the manager write them into balancer/
LABEL = "lbscaler.image"  # marks every image that was made on this host


def digest(folder: str, base: str) -> str:
    """A hash, in 12 hexadecimal digits, of the base image's name and of all files in a folder of this checkout."""
    made_from = hashlib.sha256(f"{base}\n".encode())
    for path in sorted((ROOT / folder).rglob("*")):
        is_source = path.is_file() and not path.is_symlink() and "__pycache__" not in path.parts
        if is_source and path.name not in RUN_TIME_FILES:
            made_from.update(path.read_bytes())
    return made_from.hexdigest()[:12]


def tag(folder: str, base: str) -> str:
    return f"lbscaler-{Path(folder).name}:{digest(folder, base)}"


def exists(client: Any, name: str) -> bool:
    import docker.errors  # noqa: PLC0415 - the doctor imports this module without the package

    try:
        client.api.inspect_image(name)
    except docker.errors.ImageNotFound:
        return False
    return True


def build(client: Any, output: Output, folder: str, base: str) -> str:
    """Builds the folder's image unless it exists, and returns its tag."""
    name = tag(folder, base)
    if not exists(client, name):
        base = _base_image(client, output, base)
        short = Path(folder).name
        with output.step(f"Building the {short} image") as step:
            options = {"tag": name, "labels": {LABEL: short}, "buildargs": {"BASE": base}, "forcerm": True}
            follow(step, client.api.build(path=str(ROOT / folder), decode=True, **options))
    return name


def pull(client: Any, output: Output, name: str) -> None:
    with output.step(f"Pulling {name}") as step:
        follow(step, client.api.pull(name, stream=True, decode=True))


def follow(step: Step, messages: Iterable[Mapping[str, Any]]) -> None:
    """Logs the progress that the engine reports. Raises Failed if a message is an error."""
    for message in messages:
        if "error" in message:
            raise Failed(str(message["error"]))
        text = str(message.get("stream") or message.get("status") or "").strip()
        if text and "progress" not in message:
            step.log(text)


def _base_image(client: Any, output: Output, wanted: str) -> str:
    """The name of a base image that exists on this host. If there is none, `wanted` is pulled. In place of the default
    one, if that cannot be pulled, debootstrap makes one."""
    for name in (wanted, OWN_BASE) if wanted == DEFAULT_BASE else (wanted,):
        if exists(client, name):
            return name
    try:
        pull(client, output, wanted)
    except Failed as error:
        if wanted != DEFAULT_BASE:
            raise Failed(f"the base image {wanted} is not here and cannot be pulled") from error
        _make_base_image(output)
        return OWN_BASE
    return wanted


def _make_base_image(output: Output) -> None:
    output.need("debootstrap", "making a base image without a registry", "debootstrap")
    with output.step("Making the base image with debootstrap instead"), tempfile.TemporaryDirectory() as tree:
        output.run(str(ROOT / "manager" / "base_image.sh"), tree, f"{LABEL}=base", OWN_BASE)


def main(folders: Iterable[str]) -> None:
    import docker  # noqa: PLC0415

    client, base = docker.from_env(timeout=600), os.environ.get("LB_BASE_IMAGE", DEFAULT_BASE)
    # The steps go to standard error, because a shell reads the tags from standard output.
    with redirect_stdout(sys.stderr), Output(ROOT / "run" / "images.log") as output:
        tags = [build(client, output, folder, base) for folder in folders]
    print(*tags, sep="\n")


if __name__ == "__main__":
    main(sys.argv[1:])
