"""The parts of run.sh and stop.sh that only a project on a Swarm needs."""

from __future__ import annotations

import hashlib
import json
import subprocess
import time
from collections.abc import Collection, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import docker.errors
from docker.types import RestartPolicy, SecretReference

from cli import images
from cli.output import Failed, Undo
from cli.project import Project, has_text, write

TASK_TIMEOUT = 60.0  # seconds until Swarm has started a task on this node
SERVICE_TIMEOUT = 30.0  # seconds until the manager has updated the balancers' service
DRAIN_TIMEOUT = 120.0  # seconds for the balancers of all nodes; Swarm kills each after its grace period
CLAIM_TIME = 86400  # seconds; a claim that lies this far in the future is newer than any manager's claim
CLAIM_PAUSE = 5.0  # seconds in which managers on other nodes notice a newer claim
POLL = 0.1  # seconds
FILE = "file"  # role of the secrets that backends get
TOKEN_FILE, KEY_FILE, CERTIFICATE_FILE = "token", "manager.pem", "certificate.pem"  # also the roles of their secrets
TAKEN_OVER = (TOKEN_FILE, KEY_FILE)  # what a manager on another node needs
NEW_CERTIFICATE = "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 3650"
SUBJECT = "-subj /CN=lbscaler-manager -addext subjectAltName=DNS:lbscaler-manager"


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


def share_secrets(project: Project, image: str, rotate: bool) -> dict[str, str]:
    """Stores the token and the certificate as Swarm secrets; with `rotate`, new ones. Returns the variables with
    their names for the manager, whose balancers are replaced when a name has changed.

    The certificate with its key is a third secret, which no balancer gets. A manager that takes over on another node
    uses it, so that the balancers can keep the certificate they have. Raises Failed.
    """
    stored = {}
    for file in TAKEN_OVER:
        stored[file] = next(iter(_stored(project, file)), None)
    # If files are missing here and the Swarm has them, the manager ran on another node before.
    complete = all(has_text(project.run_dir / file) for file in TAKEN_OVER)
    if not complete and all(stored.values()):
        with project.output.step("Fetching the project's secrets from the Swarm"):
            _fetch(project, stored, image)
    # Otherwise this is the first start, which makes them.
    project.make_token()
    _make_certificate(project, rotate)
    contents = {file: (project.run_dir / file).read_bytes() for file in (KEY_FILE, CERTIFICATE_FILE)}
    contents[TOKEN_FILE] = project.token.encode()
    if not rotate:
        for file, secret in stored.items():
            _check_same(project, file, contents[file], secret)
    names = {file: _share(project, file, content) for file, content in contents.items()}
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


def _make_certificate(project: Project, replace: bool) -> None:
    """Writes manager.pem, the certificate with its key, and certificate.pem, the certificate alone. A manager that runs
    keeps the certificate that it has loaded."""
    project.output.need("openssl", "the manager's certificate", "openssl")
    pem = project.run_dir / KEY_FILE
    if replace or not has_text(pem):
        command = [*NEW_CERTIFICATE.split(), *SUBJECT.split(), "-keyout", "-", "-out", "-"]
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=project.output.log, text=True, check=True)
        write(pem, done.stdout)
    done = subprocess.run(["openssl", "x509", "-in", pem], capture_output=True, text=True, check=True)
    write(project.run_dir / CERTIFICATE_FILE, done.stdout)


def _check_same(project: Project, file: str, content: bytes, secret: Any | None) -> None:
    """Raises Failed if the Swarm has other content for this file."""
    if secret is not None and secret.attrs["Spec"]["Labels"].get("lbscaler.digest") != _digest(content):
        raise Failed(
            f"run/{project.name}/{file} is not the one that this Swarm's balancers have; copy it from the node that "
            "ran the manager, or ./stop.sh first"
        )


def _share(project: Project, file: str, content: bytes) -> str:
    """Stores a file as a Swarm secret, unless it is there. Returns its name, which changes with its content."""
    name = f"{project.name}-{file.removesuffix('.pem')}-{_digest(content)[:8]}"
    _create_secret(project, name, content, project.labels(file) | {"lbscaler.digest": _digest(content)})
    return name


def _create_secret(project: Project, name: str, content: bytes, labels: Mapping[str, str]) -> None:
    """Does nothing if the Swarm has a secret with this name: names change with the content."""
    try:
        project.docker.secrets.get(name)
    except docker.errors.NotFound:
        project.docker.secrets.create(name=name, data=content, labels=labels)


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]


def remove_rotated(project: Project) -> None:
    """Removes the secrets that newer ones have replaced, as soon as the manager has given the balancers' service the
    new ones."""
    replaced = []
    for file in (*TAKEN_OVER, CERTIFICATE_FILE):
        replaced += _stored(project, file)[1:]
    if not replaced:
        return
    with project.output.step("Removing the replaced secrets"):
        deadline = time.monotonic() + SERVICE_TIMEOUT
        while replaced and time.monotonic() < deadline:
            time.sleep(POLL)
            replaced = [secret for secret in replaced if not _try_to_remove(secret)]
    if replaced:
        names = ", ".join(secret.name for secret in replaced)
        project.output.say(f"The balancers still have {names}; the next run.sh removes what they no longer have")


def _try_to_remove(secret: Any) -> bool:
    """Whether the secret is gone: Swarm keeps one that a service has."""
    try:
        secret.remove()
    except docker.errors.NotFound:
        return True
    except docker.errors.APIError:
        return False
    return True


def share_file(project: Project, name: str, path: str) -> None:
    """Stores a file of --secret as a Swarm secret. Its name changes with its content."""
    _create_secret(project, name, Path(path).read_bytes(), project.labels(FILE))


def files_of(project: Project, service: Any) -> set[str]:
    """The names of the copies in the specs of a service of backends: its own, and those that a rollback may use."""
    names = set()
    for spec in (service.attrs["Spec"], service.attrs.get("PreviousSpec", {})):
        for label in ("lbscaler.spec", "lbscaler.before"):
            tasks = json.loads(spec.get("Labels", {}).get(label, "{}"))
            secrets = tasks.get("ContainerSpec", {}).get("Secrets", ())
            names |= {secret["SecretName"].removeprefix(f"{project.name}-") for secret in secrets}
    return names


def remove_files(project: Project, in_use: Collection[str]) -> None:
    """Removes the Swarm secrets of `share_file`, except those of these copies."""
    for secret in project.docker.secrets.list(filters=project.filter(FILE)):
        if secret.name.removeprefix(f"{project.name}-") not in in_use:
            secret.remove()


# -- stop.sh ----------------------------------------------------------------------------------------------------------


def is_worker(project: Project) -> bool:
    """Whether this node runs tasks of the project but is a worker, which cannot control the Swarm."""
    node = project.swarm_node()
    if node["LocalNodeState"] != "active" or node["ControlAvailable"]:
        return False
    return any("com.docker.swarm.service.name" in container.labels for container in project.containers())


def remove_services(project: Project, drain: bool) -> None:
    """Removes the project's services. First it claims the project, as a newer manager would; otherwise a manager on
    another node would create the services again."""
    node = project.docker.nodes.get(project.swarm_node()["NodeID"])
    node.attrs["Spec"].setdefault("Labels", {})[_claim_label(project)] = f"{int(time.time()) + CLAIM_TIME} stop.sh"
    node.update(node.attrs["Spec"])
    time.sleep(CLAIM_PAUSE)
    for role in ("secrets", "balancer", "backend"):
        for service in project.services(role):
            if role == "balancer" and drain:
                with project.output.step("Waiting for the open connections on every node"):
                    _drain_everywhere(project, service)
            with project.output.step(f"Removing the service {service.name}"):
                service.remove()


def _drain_everywhere(project: Project, service: Any) -> None:
    """Makes Swarm stop the balancers of all nodes. Each accepts no new connection, waits for the open ones and ends."""
    # Swarm stops the tasks of a global service on nodes that no longer match its constraints.
    spec = service.attrs["Spec"]
    spec["TaskTemplate"].setdefault("Placement", {})["Constraints"] = ["node.role==nowhere"]
    # With another digest, a manager that is started in the meantime restores the service.
    labels = {**spec["Labels"], "lbscaler.config": "drained by stop.sh"}
    project.docker.api.update_service(
        service.id, service.version, task_template=spec["TaskTemplate"], labels=labels, fetch_current_spec=True
    )
    deadline = time.monotonic() + DRAIN_TIMEOUT
    while time.monotonic() < deadline:
        if not any(task["Status"]["State"] == "running" for task in service.tasks()):
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
