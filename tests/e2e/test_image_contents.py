"""The images that run.sh builds: no setuid files, and a list of their packages."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from cli import images
from core.settings import SETTINGS
from e2e.conftest import docker


def in_image(folder: str, command: str) -> str:
    """The output of a command that root runs in a container of the folder's image."""
    tag = images.tag(folder, SETTINGS["base_image"].default)
    return docker("run", "--rm", "--network", "none", "--user", "0", "--entrypoint", "sh", tag, "-c", command)


@pytest.mark.parametrize("folder", ["balancer", "server"])
def test_no_file_is_setuid_or_setgid(tree: Path, folder: str) -> None:
    assert in_image(folder, "find / -xdev -type f -perm /6000") == ""
    assert "/usr/bin/su" in in_image(folder, "ls -l /usr/bin/su"), "the base image has such files"


@pytest.mark.parametrize("folder", ["balancer", "server"])
def test_list_of_packages_is_complete(tree: Path, folder: str) -> None:
    bill = json.loads(in_image(folder, "cat /usr/share/sbom.cdx.json"))
    assert (bill["bomFormat"], bill["specVersion"]) == ("CycloneDX", "1.5")
    installed = in_image(folder, "dpkg-query -W -f '${Package} ${Version}\\n'").splitlines()
    assert [f"{one['name']} {one['version']}" for one in bill["components"]] == installed
    for one in bill["components"]:
        name, version = (text.replace("+", "%2B") for text in (one["name"], one["version"]))
        assert one["purl"].startswith(f"pkg:deb/debian/{name}@{version}?arch=")
