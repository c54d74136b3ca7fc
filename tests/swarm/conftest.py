from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from checkout import copy_tree
from e2e.conftest import free_port, machine_lock
from swarm.cluster import REGISTRY, Cluster, System
from waiting import wait_until

TOOLS = ("dockerd", "docker", "docker-registry", "nsenter", "ip", "hey", "curl", "openssl")


def _obstacle() -> str:
    if os.geteuid():
        return "needs root"
    if missing := [tool for tool in TOOLS if not shutil.which(tool)]:
        return f"needs {', '.join(missing)}"
    if subprocess.run(["unshare", "--net", "true"], capture_output=True, check=False).returncode:
        return "needs network namespaces"
    if subprocess.run(["docker", "info"], capture_output=True, check=False).returncode:
        return "needs a Docker Engine that answers, to build the images with"
    return ""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    ours = [item for item in items if "swarm" in item.path.parts]
    why = _obstacle() if ours else ""
    for item in ours:
        if why:
            item.add_marker(pytest.mark.skip(reason=why))


# The nodes have no way out to install or build anything: that is done here, with this host's engine. $1 is where all
# test processes find the environment and a registry's files with the images. A push compresses them, which takes long,
# so it is done once: the registry of each cluster begins with these files. $2 is a free port for that.
PREPARE = """
. manager/host.sh
mkdir -p run; LOG=run/prepare.log
[ ! -d "$1/venv" ] || cp -a "$1/venv" .venv
make_venv
[ -d "$1/venv" ] || cp -a .venv "$1/venv"
tags=$(run_module .venv/bin/python cli.images balancer server)
if [ ! -d "$1/registry" ]; then
    printf '%s\n' 'version: 0.1' "http: {addr: 127.0.0.1:$2}" \
        "storage: {filesystem: {rootdirectory: '$1/registry.new'}}" >"$1/registry.yml"
    docker-registry serve "$1/registry.yml" >run/registry.log 2>&1 &
    trap "kill $!" EXIT
    until (: <>/dev/tcp/127.0.0.1/$2) 2>/dev/null; do sleep 0.1; done
    for tag in $tags; do
        docker tag "$tag" "127.0.0.1:$2/$tag"
        docker push "127.0.0.1:$2/$tag"
        docker rmi "127.0.0.1:$2/$tag"
    done
    mv "$1/registry.new" "$1/registry"
fi
"""


def image_of(tree: Path, folder: str) -> str:
    """The tag that run.sh gives that folder's image."""
    program = f"from cli import images; print(images.tag({folder!r}, images.DEFAULT_BASE))"
    environment = {**os.environ, "PYTHONPATH": str(tree / "manager")}
    done = subprocess.run(["python3", "-c", program], env=environment, capture_output=True, text=True, check=True)
    return done.stdout.strip()


@contextmanager
def open_cluster(nodes: int) -> Iterator[Cluster]:
    """A Swarm of that many nodes."""
    # Short, and not below pytest's own folder: a socket's path has no more than 107 characters.
    with tempfile.TemporaryDirectory(prefix="lbswarm") as place:
        made = Cluster(Path(place), nodes)
        try:
            made.open()
            made.join()
            yield made
        finally:
            made.close()


def prepared_tree(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of this checkout, ready to run on the cluster's first node."""
    place = copy_tree(tmp_path_factory.mktemp("swarm") / "a checkout")
    with machine_lock("images", tmp_path_factory) as common:
        command = ["/bin/bash", "-euc", PREPARE, "prepare", str(common), str(free_port())]
        done = subprocess.run(command, cwd=place, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    shutil.copytree(common / "registry", cluster.place / "registry", dirs_exist_ok=True)
    for folder in ("balancer", "server"):
        cluster.nodes[0].pull(image_of(place, folder))
    return place


# To make a cluster takes long, so all tests of one process share it.
@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    with open_cluster(3) as made:
        yield made


@pytest.fixture(scope="session")
def tree(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepared_tree(cluster, tmp_path_factory)


@pytest.fixture(scope="module")
def running(cluster: Cluster, tree: Path) -> Iterator[System]:
    """Three backends that no load moves, on three nodes."""
    system = System(cluster, cluster.nodes[0], tree)
    system.up("3", *System.FAST, "--registry", REGISTRY, "--min", "3", "--max", "9", "--target", "100000")
    yield system
    system.end_manager()  # everything else ends with the cluster


@pytest.fixture
def system(running: System) -> System:
    wait_until(running.cluster.whole, "every node is there", 90)
    running.scale(min=3, max=3)
    running.wait_for_active(3)
    return running
