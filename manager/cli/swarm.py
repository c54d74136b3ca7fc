"""The parts of run.sh and stop.sh that only a project on a Swarm needs."""

from __future__ import annotations

import hashlib
import json
import subprocess
import time
from collections.abc import Collection, Iterable, Mapping
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import docker.errors
from docker.types import RestartPolicy, SecretReference

from cli import images
from cli.output import Failed, Undo
from cli.project import Project, has_text, write

TASK_TIMEOUT = 60.0  # seconds until Swarm has started a task on this node
SERVICE_TIMEOUT = 30.0  # seconds until the manager has updated the balancers' service
DRAIN_MARGIN = 30.0  # seconds after the drain timeout for Swarm to stop the balancers of all nodes
CLAIM_TIME = 86400  # seconds; a claim that lies this far in the future is newer than any manager's claim
CLAIM_PAUSE = 5.0  # seconds in which managers on other nodes notice a newer claim
POLL = 0.1  # seconds
FILE = "file"  # role of the secrets that backends get
TOKEN_FILE, KEY_FILE, CERTIFICATE_FILE = "token", "manager.pem", "certificate.pem"  # also the roles of their secrets
NEEDED_ON_ANOTHER_NODE = (TOKEN_FILE, KEY_FILE)  # by a manager that takes over there
NEW_CERTIFICATE = "req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 3650"
CERTIFICATE_NAMES = "-subj /CN=lbscaler-manager -addext subjectAltName=DNS:lbscaler-manager"


# -- run.sh -----------------------------------------------------------------------------------------------------------


def join(project: Project, advertise: str, registry: str, may_init: bool, undo: Undo) -> str:
    """Checks that this host is a manager of a Swarm, or makes it one if `may_init`. Returns the address at which the
    other nodes reach it. Raises Failed."""
    api = project.docker.api
    if project.swarm_node()["LocalNodeState"] == "inactive":
        if not may_init:
            raise Failed("this host is in no Swarm; join one as a manager, or make one with --swarm-init")
        undo.add("leave the Swarm", lambda: api.leave_swarm(force=True))
        with project.output.step("Making this host a Swarm"):
            api.init_swarm(advertise_addr=advertise or None)
    node = project.swarm_node()
    if node["LocalNodeState"] != "active":
        raise Failed(f"this host's state in its Swarm is '{node['LocalNodeState']}', not active; see docker info")
    if not node["ControlAvailable"]:
        raise Failed("this node is a worker of its Swarm; run on a manager of it, or: docker node promote")
    # An image that was built here exists on this node only.
    nodes = len(project.docker.nodes.list())
    if nodes > 1 and not registry:
        raise Failed(f"the Swarm has {nodes} nodes, which need a registry to get the images from: --registry HOST:PORT")
    return advertise or str(node["NodeAddr"])


def publish(project: Project, registry: str, name: str) -> str:
    """Pushes an image to the registry and returns its name there. An image that is named by an id, or with the
    registry, is left as it is."""
    if name.startswith((f"{registry}/", "sha256:")):
        return name
    there = f"{registry}/{name}"
    with project.output.step(f"Publishing {name} at {registry}") as step:
        project.docker.images.get(name).tag(there)
        images.follow(step, project.docker.api.push(there, stream=True, decode=True))
    return there


def share_secrets(project: Project, image: str, rotate: bool, undo: Undo) -> dict[str, str]:
    """Stores the token and the certificate as Swarm secrets. Returns their names by file; `variables` has those that
    the manager gets. Its balancers are replaced when a name has changed. Raises Failed.

    The certificate with its key is a third secret, which no balancer gets. A manager that takes over on another node
    uses it, so that the balancers can keep the certificate they have. With `rotate`, the certificate is made again. Its
    files here stay as they are until `Project.write_secrets`, because the running manager has them.
    """
    stored = {file: _stored(project, file) for file in NEEDED_ON_ANOTHER_NODE}
    # If files are missing here and the Swarm has them, the manager ran on another node before.
    complete = all(has_text(project.run_dir / file) for file in NEEDED_ON_ANOTHER_NODE)
    if not complete and all(stored.values()):
        with project.output.step("Fetching the project's secrets from the Swarm"):
            _fetch(project, {file: found[0] for file, found in stored.items()}, image)
    # Otherwise this is the first start, which makes them.
    project.make_token()
    project.certificate_files = _certificate(project, rotate)
    contents = {TOKEN_FILE: project.token, **project.certificate_files}
    names = {file: _secret_name(project, file, content) for file, content in contents.items()}
    if not rotate:
        for file, found in stored.items():
            _check_same(project, file, names[file], found)
    for file, content in contents.items():
        if _create_secret(project, names[file], content.encode(), project.labels(file)):
            undo.add(f"remove the secret {names[file]}", partial(_remove_secret, project, names[file]))
    return names


def variables(names: Mapping[str, str]) -> dict[str, str]:
    """The manager's variables with the names of the secrets for the balancers."""
    return {"LB_TOKEN_SECRET": names[TOKEN_FILE], "LB_CERTIFICATE_SECRET": names[CERTIFICATE_FILE]}


def _stored(project: Project, file: str) -> list[Any]:
    """The Swarm secrets of this file, the newest first. After a rotation, an older one exists until it is removed."""
    found = project.docker.secrets.list(filters=project.filter(file))
    return sorted(found, key=lambda secret: str(secret.attrs["CreatedAt"]), reverse=True)


def _fetch(project: Project, stored: Mapping[str, Any], image: str) -> None:
    """Reads the missing files from a short-lived task on this node, because Swarm gives secrets to tasks only."""
    for service in project.services("secrets"):  # of a start that was killed
        service.remove()
    references = [SecretReference(secret.id, secret.name, filename=file) for file, secret in stored.items()]
    service = project.docker.services.create(
        image,
        command=["sleep", "120"],
        name=f"{project.name}-secrets",
        labels=project.labels("secrets"),
        constraints=[f"node.id=={project.swarm_node()['NodeID']}"],
        restart_policy=RestartPolicy(condition="none"),
        secrets=references,
    )
    try:
        container = _task_of(project, f"{project.name}-secrets")
        for file in stored:
            path = project.run_dir / file
            if not has_text(path):
                code, text = container.exec_run(["cat", f"/run/secrets/{file}"])
                if code:
                    raise Failed(f"cannot read the secret {file}: {text.decode(errors='replace').strip()}")
                write(path, text.decode())
    finally:
        service.remove()


def _task_of(project: Project, service: str) -> Any:
    """Waits for the service's container on this node and returns it. Raises Failed."""
    deadline = time.monotonic() + TASK_TIMEOUT
    while time.monotonic() < deadline:
        label = f"com.docker.swarm.service.name={service}"
        found = project.docker.containers.list(filters={"label": label})
        if found:
            return found[0]
        time.sleep(POLL)
    raise Failed(f"Swarm did not start the service {service}")


def _certificate(project: Project, new: bool) -> dict[str, str]:
    """The certificate with its key, and the certificate alone, by their files. They are made if `new`, or if there are
    none yet. Raises Failed."""
    project.output.need("openssl", "the manager's certificate", "openssl")
    path = project.run_dir / KEY_FILE
    if has_text(path) and not new:
        pem = path.read_text()
    else:
        pem = _openssl(*NEW_CERTIFICATE.split(), *CERTIFICATE_NAMES.split(), "-keyout", "-", "-out", "-")
    return {KEY_FILE: pem, CERTIFICATE_FILE: _openssl("x509", text=pem)}


def _openssl(*arguments: str, text: str = "") -> str:
    done = subprocess.run(["openssl", *arguments], input=text, capture_output=True, text=True, check=False)
    if done.returncode:
        raise Failed(f"the certificate {KEY_FILE} cannot be made or read: {done.stderr.strip()}")
    return done.stdout


def _check_same(project: Project, file: str, name: str, stored: Iterable[Any]) -> None:
    """Raises Failed if the Swarm has this file, and only with other content, that is, with other names. (A rotation
    that was interrupted leaves a newer one, too.)"""
    names = {secret.name for secret in stored}
    if names and name not in names:
        raise Failed(
            f"run/{project.name}/{file} is not the one that this Swarm's balancers have; copy it from the node that "
            "ran the manager, or ./stop.sh first"
        )


def _secret_name(project: Project, file: str, content: str) -> str:
    """The name of a file's Swarm secret, which changes with its content."""
    digest = hashlib.sha256(content.encode()).hexdigest()
    return f"{project.name}-{file.removesuffix('.pem')}-{digest[:8]}"


def _create_secret(project: Project, name: str, content: bytes, labels: Mapping[str, str]) -> bool:
    """Creates the secret, unless the Swarm has one with this name: names change with the content. Returns whether it
    did."""
    try:
        project.docker.secrets.get(name)
    except docker.errors.NotFound:
        project.docker.secrets.create(name=name, data=content, labels=labels)
        return True
    return False


def remove_rotated(project: Project, names: Mapping[str, str]) -> None:
    """Removes the secrets of these files with other names, as soon as the balancers' service no longer has them."""
    replaced = []
    for file, name in names.items():
        replaced += [secret for secret in _stored(project, file) if secret.name != name]
    if not replaced:
        return
    with project.output.step("Removing the replaced secrets"):
        deadline = time.monotonic() + SERVICE_TIMEOUT
        while replaced and time.monotonic() < deadline:
            time.sleep(POLL)
            replaced = [secret for secret in replaced if not _remove_secret(project, secret.name)]
    if replaced:
        left = ", ".join(secret.name for secret in replaced)
        project.output.say(f"The balancers still have {left}; the next run.sh removes what they no longer have")


def _remove_secret(project: Project, name: str) -> bool:
    """Removes the secret unless a service has it. Returns whether it is gone."""
    try:
        project.docker.secrets.get(name).remove()
    except docker.errors.NotFound:
        return True
    except docker.errors.APIError:  # a service has it
        return False
    return True


def share_file(project: Project, name: str, path: str) -> None:
    """Stores a file of --secret as a Swarm secret. Its name changes with its content."""
    _create_secret(project, name, Path(path).read_bytes(), project.labels(FILE))


def files_of(project: Project, service: Any) -> set[str]:
    """The names of the copies that the tasks of a service of backends need, now or after an update is undone."""
    names = set()
    for label in ("lbscaler.spec", "lbscaler.before"):
        tasks = json.loads(service.attrs["Spec"]["Labels"].get(label, "{}"))
        secrets = tasks.get("ContainerSpec", {}).get("Secrets", ())
        names |= {secret["SecretName"].removeprefix(f"{project.name}-") for secret in secrets}
    return names


def remove_files(project: Project, in_use: Collection[str]) -> None:
    """Removes the Swarm secrets of `share_file`, except those of these copies."""
    for secret in project.docker.secrets.list(filters=project.filter(FILE)):
        if secret.name.removeprefix(f"{project.name}-") not in in_use:
            _remove_secret(project, secret.name)


# -- stop.sh ----------------------------------------------------------------------------------------------------------


def is_worker(project: Project) -> bool:
    """Whether this node runs tasks of the project but is a worker, which cannot control the Swarm."""
    node = project.swarm_node()
    if node["LocalNodeState"] != "active" or node["ControlAvailable"]:
        return False
    return any("com.docker.swarm.service.name" in container.labels for container in project.containers())


def remove_services(project: Project, drain: float) -> None:
    """Removes the project's services; the balancers first wait for their open connections, for `drain` seconds at most.

    Before that it claims the project, as a newer manager would; otherwise a manager on another node would create the
    services again.
    """
    node = project.docker.nodes.get(project.swarm_node()["NodeID"])
    node.attrs["Spec"].setdefault("Labels", {})[_claim_label(project)] = f"{int(time.time()) + CLAIM_TIME} stop.sh"
    node.update(node.attrs["Spec"])
    time.sleep(CLAIM_PAUSE)
    for role in ("secrets", "balancer", "backend"):
        for service in project.services(role):
            if role == "balancer" and drain:
                with project.output.step("Waiting for the open connections on every node"):
                    _drain_everywhere(project, service, drain)
            with project.output.step(f"Removing the service {service.name}"):
                service.remove()


def _drain_everywhere(project: Project, service: Any, seconds: float) -> None:
    """Makes Swarm stop the balancers of all nodes. Each accepts no new connection, waits for the open ones and ends."""
    down = {node.id for node in project.docker.nodes.list() if node.attrs["Status"]["State"] == "down"}
    # Swarm stops the tasks of a global service on nodes that no longer match its constraints.
    spec = service.attrs["Spec"]
    spec["TaskTemplate"].setdefault("Placement", {})["Constraints"] = ["node.role==nowhere"]
    # With another digest, a manager that is started in the meantime restores the service.
    labels = {**spec["Labels"], "lbscaler.config": "drained by stop.sh"}
    project.docker.api.update_service(
        service.id, service.version, task_template=spec["TaskTemplate"], labels=labels, fetch_current_spec=True
    )
    deadline = time.monotonic() + seconds + DRAIN_MARGIN
    while time.monotonic() < deadline:
        running = [task for task in service.tasks() if task["Status"]["State"] == "running"]
        # Swarm lists the tasks of a node that is down as running for ever.
        if all(task["NodeID"] in down for task in running):
            return
        time.sleep(POLL)


def forget(project: Project) -> None:
    """Removes the claims and the secrets, which exist without a service after a start that failed."""
    label = _claim_label(project)
    for node in project.docker.nodes.list():
        if node.attrs["Spec"].get("Labels", {}).pop(label, None) is not None:
            with suppress(docker.errors.APIError):  # the node has changed; without services the claim has no effect
                node.update(node.attrs["Spec"])
    for secret in project.docker.secrets.list(filters=project.filter()):
        secret.remove()


def _claim_label(project: Project) -> str:
    return f"lbscaler.manager.{project.name}"
