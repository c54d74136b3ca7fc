"""Every command of the README works to the letter, but for the ports and the name that keep it off a live system."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

from e2e.conftest import System, docker

README = (Path(__file__).parents[2] / "README.md").read_text()


def commands() -> list[str]:
    blocks = re.findall(r"^```sh\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
    return [line for block in blocks for line in block.splitlines()]


def test_every_command_of_the_readme_works(tree: Path) -> None:
    system = System(tree, "lbreadme")
    stand_ins = {
        "sudo ": "",  # the tests are root already, maybe where there is no sudo
        "localhost:8000": f"localhost:{system.port}",
        "localhost:5000": f"localhost:{system.manager_port}",
        "run/lbscaler/": "run/lbreadme/",
    }
    places = {"LB_PROJECT": "lbreadme", "LB_PORT": str(system.port), "LB_MANAGER_PORT": str(system.manager_port)}
    ran = []
    try:
        for command in commands():
            if command.endswith("tests/run.sh"):
                continue  # this is it
            text = command
            for there, here in stand_ins.items():
                text = text.replace(there, here)
            if text.startswith("curl ") or " curl " in f" {text}":
                text = text.replace("curl ", "curl --fail --silent --show-error ", 1)
            environment = {**os.environ, **places}
            done = subprocess.run(
                text, shell=True, cwd=tree, env=environment, capture_output=True, text=True, timeout=300, check=False
            )
            assert done.returncode == 0, f"{command}\n{done.stdout}{done.stderr}"
            ran.append(command)
        assert "primes" in system.get()
        assert (system.status()["max"], system.status()["target"]) == (20, 200)
    finally:
        system.down("--now")
    assert len(ran) > 8
    assert docker("network", "ls", "-q", "--filter", "name=lbreadme") == ""
