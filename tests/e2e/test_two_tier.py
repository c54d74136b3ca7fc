"""The commands of docs/examples/two-tier/README.md under load: a scale-out and an update by a changed file."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from e2e.conftest import FAST, Load, System, docker, machine_lock, wait_until

EXAMPLE = (Path(__file__).parents[2] / "docs" / "examples" / "two-tier" / "README.md").read_text()


def commands(heading: str) -> list[str]:
    section = EXAMPLE.partition(f"## {heading}\n")[2].partition("\n## ")[0]
    blocks = re.findall(r"^```sh\n(.*?)^```", section, re.MULTILINE | re.DOTALL)
    return [line for block in blocks for line in block.replace("\\\n", "").splitlines()]


class Example:
    """The example's project under another name and on other ports, so that it does not affect a live one."""

    def __init__(self, tree: Path) -> None:
        self.system = System(tree, f"lbshop{os.getpid()}")
        base = docker("image", "ls", "-q", "--filter", "label=lbscaler.image=base").split()
        build = f"docker build --label lbscaler.image=test --build-arg BASE={(base or ['debian:trixie-slim'])[0]}"
        self.stand_ins = {
            "docker build": build,
            "shop": self.system.project,
            "localhost:8080": f"localhost:{self.system.port}",
            "--port 8080": f"--port {self.system.port}",
            "--manager-port 5080": f"--manager-port {self.system.manager_port}",
            "--image ": f"{' '.join(FAST)} --max 5 --image ",
        }

    def run(self, heading: str) -> str:
        """Runs the commands under this heading. Returns what the last one printed."""
        printed = ""
        for command in commands(heading):
            text = command
            for there, here in self.stand_ins.items():
                text = text.replace(there, here)
            done = subprocess.run(
                text, shell=True, cwd=self.system.tree, capture_output=True, text=True, timeout=300, check=False
            )
            assert done.returncode == 0, f"{command}\n{done.stdout}{done.stderr}"
            printed = done.stdout
        return printed

    def names(self) -> set[str]:
        return {backend["name"] for backend in self.system.active()}

    def containers(self) -> set[str]:
        """The ids: a new container may get the name of a removed one."""
        return set(docker("inspect", "-f", "{{.Id}}", *self.names()).split())


@pytest.fixture(scope="module")
def example(tree: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Example]:
    made = Example(tree)
    with machine_lock("images", tmp_path_factory):
        made.run("Build")
    try:
        made.run("The database")
        assert made.run("The web tier").startswith("Hello, request ")
        yield made
    finally:
        made.run("Remove")
    assert made.system.nothing_left()


def test_scale_out_and_update_by_a_changed_file_fail_no_request(
    example: Example, figure: Callable[[str], None]
) -> None:
    system = example.system
    load = Load(system.port, seconds=40, per_second=60)
    wait_until(lambda: len(system.active()) > 2, "a scale-out", 30)
    before = example.containers()
    assert example.run("Update").startswith("Welcome, request ")
    assert not before & example.containers(), "every backend was replaced"
    answered, others, slowest = load.result()
    figure(f"two tiers, scale-out and update: {others} of {answered + others} failed, slowest {slowest:.2f} s")
    assert (answered > 600, others) == (True, 0)


def test_password_is_a_file_that_only_the_backends_user_can_read(example: Example) -> None:
    system = example.system
    name = min(example.names())
    assert docker("exec", name, "stat", "-c", "%a %u", "/run/secrets/password") == "400 10001"
    password = (system.tree / "run" / f"{system.project}-files" / "password").read_text().strip()
    assert password not in docker("inspect", name)
    assert "Welcome" not in docker("inspect", "-f", '{{index .Config.Labels "lbscaler.spec"}}', name)
    for text in (str(system.status()), (system.run_dir / "settings.json").read_text(), system.log()):
        assert "Welcome" not in text
    (copy,) = (system.run_dir / "secrets").glob("*-10001")
    assert (copy.stat().st_mode & 0o777, copy.stat().st_uid) == (0o400, 10001)
    copies = [path for path in copy.parent.iterdir() if path.is_file()]
    assert len(copies) <= 3, "one secret, and env files that backends use"


def test_env_file_that_does_not_work_is_undone(example: Example) -> None:
    system = example.system
    stored = (system.run_dir / "settings.json").read_text()
    file = system.tree / "run" / f"{system.project}-files" / "web.env"
    good = file.read_text()
    file.write_text("REDIS_HOST=nowhere\nGREETING=Broken\n")
    try:
        output = system.up("--ready-timeout", "5", status=1)
    finally:
        file.write_text(good)
    assert "what ran before is used again" in output
    assert "Broken" not in output
    assert (system.run_dir / "settings.json").read_text() == stored
    assert system.get().startswith("Welcome, request ")
    assert "settings are unchanged" in system.up()
