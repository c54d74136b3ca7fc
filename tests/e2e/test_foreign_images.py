"""Images that were not made for this project: nginx, and redis for plain TCP, from Debian's packages."""

from __future__ import annotations

import json
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from e2e.conftest import FAST, Load, System, docker, machine_lock, wait_until


@pytest.fixture(scope="module")
def images(tree: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """nginx and redis as they are usually packaged: as root, with logs in the usual places."""
    base = docker("image", "ls", "-q", "--filter", "label=lbscaler.image=base") or "debian:trixie-slim"
    recipes = {  # both packages in one layer, because installations are slow
        "packages": f"FROM {base.split()[0]}\n"
        "RUN apt-get update && apt-get install -y --no-install-recommends nginx-light redis-server",
        "nginx": "FROM lbtest-packages\n"
        "RUN ln -sf /dev/stderr /var/log/nginx/error.log && ln -sf /dev/stdout /var/log/nginx/access.log\n"
        'CMD ["nginx", "-g", "daemon off;"]',
        "redis-server": 'FROM lbtest-packages\nCMD ["redis-server", "--protected-mode", "no", "--save", ""]',
    }
    with machine_lock("images", tmp_path_factory):
        for name, recipe in recipes.items():
            command = ["docker", "build", "-q", "-t", f"lbtest-{name}", "-"]
            text = f"{recipe}\nLABEL lbscaler.image=test\n"
            subprocess.run(command, input=text, text=True, check=True, timeout=300)
    return {name: f"lbtest-{name}" for name in recipes}


@pytest.fixture
def site(tmp_path: Path) -> Path:
    (tmp_path / "index.html").write_text("a page of ours\n")
    tmp_path.chmod(0o755)
    return tmp_path


def tmpfs_flags(paths: str) -> list[str]:
    return [word for place in paths.split() for word in ("--tmpfs", place)]


NGINX = tmpfs_flags("/run /var/lib/nginx")


@pytest.fixture
def nginx(fresh: System, images: dict[str, str]) -> Iterator[System]:
    fresh.flags += ("--image", images["nginx"], "--backend-port", "80")
    yield fresh


def user_of(system: System) -> set[str]:
    """The users that the backends run as."""
    return {docker("inspect", "-f", "{{.Config.User}}", backend["name"]) for backend in system.active()}


def test_nginx_serves_as_unprivileged_user_on_a_read_only_file_system_and_is_scaled(nginx: System, site: Path) -> None:
    nginx.up(
        "2", *FAST, *NGINX, "--health", "http:/index.html", "--volume", f"{site}:/var/www/html",
        "--env", "GREETING=two words", "--memory", "64m", "--cpus", "0.5",
    )  # fmt: skip
    nginx.wait_for_active(2)
    assert nginx.get() == "a page of ours\n"
    assert user_of(nginx) == {"10001:10001"}
    name = nginx.active()[0]["name"]
    assert docker("exec", name, "printenv", "GREETING") == "two words"
    limits = json.loads(docker("inspect", "-f", "{{json .HostConfig}}", name))
    assert (limits["Memory"], limits["NanoCpus"], limits["ReadonlyRootfs"]) == (64 << 20, 500_000_000, True)
    load = Load(nginx.port, seconds=60, per_second=80)
    wait_until(lambda: len(nginx.active()) > 2, "a scale-out", 30)
    _, others, _ = load.stop()
    assert others == 0
    nginx.wait_for_active(2, 60)
    assert "drained in" in nginx.log()


def test_changed_options_replace_the_backends_and_allow_removes_the_restrictions(nginx: System) -> None:
    nginx.up("2", *FAST, *NGINX)
    before = {backend["ip"]: backend["name"] for backend in nginx.wait_for_active(2)}
    nginx.up("--allow", "root,capabilities,write", "--tmpfs", "", "--env", "NEW=1")

    def replaced() -> bool:
        return len(nginx.active()) == 2 and user_of(nginx) == {""} and len(nginx.status()["backends"]) == 2

    wait_until(replaced, f"both of {before} replaced", 60)
    assert "replaced by the update" in nginx.log()


@pytest.mark.parametrize(
    ("flags", "reason", "advice"),
    [
        ((), "Read-only file system", "--tmpfs PATH, or --allow write"),
        (("--allow", "write"), "Permission denied", "--allow root"),
    ],
)
def test_image_that_needs_more_rights_fails_with_the_reason_and_the_flag(
    nginx: System, flags: tuple[str, ...], reason: str, advice: str
) -> None:
    output = nginx.up("1", *FAST, "--min", "1", *flags, status=1)
    assert reason in output
    assert advice in output
    assert "Traceback" not in output
    assert nginx.nothing_left()


def test_wrong_health_path_is_reported_with_its_status_code(nginx: System) -> None:
    flags = ("--min", "1", "--health", "http:/nothing-here", "--ready-timeout", "4")
    process = nginx.start("1", *FAST, *NGINX, *flags)
    output, _ = process.communicate(timeout=200)
    assert process.returncode == 1
    assert "GET /nothing-here on port 80: status 404" in output
    assert "--health" in output


def send(system: System, words: str) -> str:
    with socket.create_connection(("127.0.0.1", system.port), 10) as connection:
        connection.sendall(f"{words}\r\n".encode())
        return connection.recv(4096).decode().strip()


def test_redis_serves_over_plain_tcp_with_another_command(fresh: System, images: dict[str, str]) -> None:
    command = "redis-server --protected-mode no --save '' --port 7000 --maxmemory 5mb"
    fresh.up(
        "3", *FAST, "--min", "3", "--image", images["redis-server"], "--backend-port", "7000", "--command", command
    )
    fresh.wait_for_active(3)
    assert send(fresh, "PING") == "+PONG"
    for _ in range(30):
        assert send(fresh, "INCR counter").startswith(":")
    counts = [int(docker("exec", b["name"], "redis-cli", "-p", "7000", "GET", "counter") or 0) for b in fresh.active()]
    assert sum(counts) == 30
    assert min(counts) > 0
