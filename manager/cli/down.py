"""The second part of `./stop.sh`, once .venv exists: it waits for the open connections, then removes the whole project.

Guarantees: nothing that belongs to another project or to the user is removed; it can be run again; if something cannot
be removed, it is named and the exit code is 1.
"""

from __future__ import annotations

import shutil
import sys
import time
from argparse import Namespace
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any

import docker.errors
import requests

from cli import images, network, output, swarm, unit
from cli.arguments import stop_arguments
from cli.output import Failed, Output
from cli.processes import MANAGER, SUPERVISOR, find
from cli.project import Project, remove_container
from core.settings import ROOT, SETTINGS, chain_prefix, read, stored, variable, with_stored

DRAIN_MARGIN = 10.0  # seconds after the drain timeout until the command that drains is ended
STOP_GRACE = 10  # seconds between SIGTERM and SIGKILL for a container
NETWORK_TIMEOUT = 60.0  # seconds; in a Swarm other nodes' tasks use the network until they have ended
GONE_TIMEOUT = 10.0  # seconds; a Swarm lists a network for a moment after its removal
POLL = 0.5  # seconds
# In run/<project>/.
TEMPORARY = ("token", "environment", "backends", "manager.sock", "*.pem", "*.pid", "*.new")


def remove(project: Project, drain: float) -> None:
    """Removes everything of the project; open connections have `drain` seconds to end. Raises Failed."""
    # The manager first, because it would launch again what is removed.
    if project.manager_runs() or project.supervisor_runs() or unit.is_installed(project.name):
        with project.output.step("Stopping the manager"):
            project.end_manager()
            unit.remove(project.name)
    network.remove_host_rules(project)
    answers = engine_answers(project)
    kept = False
    if answers:
        kept = _remove_from_engine(project, drain)
    _check_nothing_is_left(project, answers, kept)
    _remove_files(project)
    if not answers:
        raise Failed(
            f"no Docker Engine answers, so containers of project {project.name} may be left. "
            "When the engine answers, run ./stop.sh again"
        )
    # The next stop.sh needs the ports and the drain timeout as long as anything may be left.
    (project.run_dir / "settings.json").unlink(missing_ok=True)
    project.output.say(f"Project {project.name} is down; its log stays in {project.run_dir / 'manager.log'}")


def engine_answers(project: Project) -> bool:
    with suppress(Failed, docker.errors.DockerException, requests.RequestException):
        return bool(project.docker.ping())
    return False


def _remove_from_engine(project: Project, drain: float) -> bool:
    """Removes containers, services, secrets and the network. Returns whether the network had to be kept."""
    # A worker cannot remove the services, which would start the containers again.
    if swarm.is_worker(project):
        raise Failed("this node is a worker of a Swarm; run stop.sh on a manager of it")
    if project.services():
        swarm.remove_services(project, drain)
    elif drain:
        _drain(project, drain)
    # A start that failed may have left these without any service.
    if project.is_swarm_manager():
        swarm.forget(project)
    project.remove_checks()
    _remove_containers(project, "balancer")
    network_of_project = project.network()
    if network_of_project is not None and network.is_on_host(network_of_project):
        _remove_rules(project)
    _remove_containers(project, "backend")
    return _remove_network(project)


def _drain(project: Project, seconds: float) -> None:
    """Waits for the open connections of each balancer. If that fails, the removal continues."""
    for balancer in project.docker.containers.list(filters=project.filter("balancer")):
        with project.output.step(f"Waiting for open connections, {seconds:g} s at most"):
            command = ["timeout", f"{seconds + DRAIN_MARGIN:g}", "/bin/bash", "/balancer/script.sh", "drain"]
            with suppress(docker.errors.APIError):
                _, text = balancer.exec_run([*command, f"{seconds:.0f}"])
                project.output.log.write(text.decode(errors="replace"))


def _remove_rules(project: Project) -> None:
    """Removes the project's rules from the host's namespace, in a container of the balancer's image: any version of it
    can do so, and the host may lack the programs."""
    found = project.docker.images.list(filters={"label": f"{images.LABEL}=balancer"})
    if not found:
        raise Failed("the host's tables still have the project's rules: there is no balancer image to remove them with")
    image = max(found, key=lambda one: str(one.attrs["Created"]))
    settings = read(with_stored({variable("project"): project.name}))
    ports = ",".join(f"{port}:{backend_port}" for port, backend_port in settings.ports)
    with project.output.step("Removing the project's rules from the host's tables") as step:
        log = project.docker.containers.run(
            image.id,
            "remove",
            remove=True,
            network_mode="host",
            labels=project.labels("check"),
            cap_drop=["ALL"],
            cap_add=["NET_ADMIN", "NET_RAW"],
            environment={"LB_PREFIX": chain_prefix(project.name), "LB_PORTS": ports},
        )
        step.log(log.decode(errors="replace"))


def _remove_containers(project: Project, role: str) -> None:
    containers = project.containers(role)
    if not containers:
        return
    with project.output.step(f"Removing {role} containers: {len(containers)}"), ThreadPoolExecutor() as pool:
        list(pool.map(_remove_container, containers))


def _remove_container(container: Any) -> None:
    with suppress(docker.errors.APIError):  # it may not run, or not stop; the removal below is forced
        container.stop(timeout=STOP_GRACE)
    remove_container(container)


def _remove_network(project: Project) -> bool:
    """Returns whether the network had to be kept because a foreign container is attached to it."""
    found = project.network()
    if found is None:
        return False
    # In a Swarm the project's own tasks may still be attached, also on other nodes.
    found.reload()
    if found.attrs["Driver"] != "overlay" and found.attrs["Containers"]:
        names = ", ".join(one["Name"] for one in found.attrs["Containers"].values())
        project.output.say(f"Keeping the network {project.name}, because these containers are attached: {names}")
        return True
    # The engine refuses the removal until the last task has ended.
    with project.output.step(f"Removing the network {project.name}"):
        deadline = time.monotonic() + NETWORK_TIMEOUT
        while True:
            try:
                found.remove()
            except docker.errors.NotFound:
                return False
            except docker.errors.APIError:
                if time.monotonic() > deadline:
                    raise
            else:
                return False
            time.sleep(POLL)


# -- afterwards -------------------------------------------------------------------------------------------------------


def _check_nothing_is_left(project: Project, answers: bool, network_kept: bool) -> None:
    """Raises Failed if something of the project exists, such as a container that another program has started again."""
    deadline = time.monotonic() + GONE_TIMEOUT
    while left := list(_left(project, answers, network_kept)):
        if time.monotonic() > deadline:
            raise Failed(f"project {project.name} is not down, left: {', '.join(left)}; run ./stop.sh again")
        time.sleep(POLL)


def _left(project: Project, answers: bool, network_kept: bool) -> Iterator[str]:
    for program in (SUPERVISOR, MANAGER):
        for pid in find(project.name, program):
            yield f"process {pid}"
    if not answers:
        return
    owned: dict[str, list[Any]] = {"service": project.services(), "container": project.containers()}
    if project.is_swarm_manager():
        owned["secret"] = project.docker.secrets.list(filters=project.filter())
    if not network_kept:
        owned["network"] = project.docker.networks.list(filters=project.filter())
    for kind, items in owned.items():
        for item in items:
            yield f"{kind} {item.name}"


def _remove_files(project: Project) -> None:
    """Removes the project's files except the logs and the recorded load."""
    place = project.run_dir / "balancer"
    for name in images.RUN_TIME_FILES:
        link = ROOT / "balancer" / name
        if link.is_symlink() and link.readlink().parts[-3:] == (project.name, "balancer", name):
            link.unlink()
    # The recorded load is kept beside the logs.
    with suppress(FileNotFoundError):
        (place / "trace.csv").replace(project.run_dir / "trace.csv")
    shutil.rmtree(place, ignore_errors=True)
    shutil.rmtree(project.secrets_dir, ignore_errors=True)
    for pattern in TEMPORARY:
        for path in project.run_dir.glob(pattern):
            path.unlink()


def _remove_images(project: Project) -> None:
    """Removes the images in several passes, because an image cannot be removed before those that are built on it."""
    filters = {"label": images.LABEL}
    for _ in range(3):
        for image in project.docker.images.list(filters=filters):
            with suppress(docker.errors.APIError):
                project.docker.images.remove(image.id, force=True)
    kept = [image.short_id for image in project.docker.images.list(filters=filters)]
    if kept:
        project.output.say(f"Keeping images that are in use: {' '.join(kept)}")
    else:
        project.output.say("Removed the images made by run.sh")


def run(arguments: Namespace, out: Output) -> None:
    project = Project(arguments.project, out)
    timeout = stored(project.name).get(variable("drain_timeout"), SETTINGS["drain_timeout"].default)
    remove(project, 0 if arguments.now else float(timeout))
    if arguments.images and engine_answers(project):
        _remove_images(project)
    if arguments.engine:
        with out.step("Stopping the Docker Engine, if run.sh started it"):
            out.run("bash", "-c", ". manager/host.sh; stop_engine")


def main() -> int:
    arguments = stop_arguments(sys.argv[1:])
    return output.main("stop.sh", ROOT / "run" / arguments.project, "stop.log", lambda out: run(arguments, out))


if __name__ == "__main__":
    sys.exit(main())
