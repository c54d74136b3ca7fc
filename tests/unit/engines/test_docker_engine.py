"""The Docker engine over an API in memory: the balancer's state and repair, ended backends, backends' routes."""

from __future__ import annotations

import json
import logging
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import docker.errors
import pytest

import script
from core.engine import BalancerState, EngineError, NameTaken
from core.settings import Settings
from core.workers import WORKERS
from engines import base, docker_engine
from engines.docker_engine import DockerEngine
from engines.options import BalancerOptions
from fakes import settings
from fakes_engine import FakeEngine


class Docker:
    """Docker's client and API, as far as the engine calls them. Containers by id."""

    def __init__(self) -> None:
        self.api = self.networks = self.containers_of = self
        self.rows: dict[str, dict[str, Any]] = {}
        self.calls: list[tuple[str, str]] = []
        self.pids: dict[str, int] = {}
        self.id = "0123456789abcdef"  # of the network
        self.created: list[Created] = []
        self.start_error: Exception | None = None
        self.removals_in_progress = 0
        self.attrs = {"IPAM": {"Config": [{"Gateway": "198.18.0.1", "Subnet": "198.18.0.0/20"}]}}

    def get(self, _name: str) -> Docker:
        return self

    def add(self, id_: str, role: str, state: str = "running", ip: str = "198.18.0.9", **labels: str) -> None:
        self.rows[id_] = {
            "Id": id_,
            "Names": [f"/{id_}"],
            "ImageID": "image",
            "State": state,
            "Labels": {"lbscaler.project": "p", "lbscaler.role": role, **labels},
            "NetworkSettings": {"Networks": {"p": {"IPAddress": ip}}},
        }

    def inspect_container(self, id_: str) -> dict[str, Any]:
        return {"State": {"Pid": self.pids.get(id_, 1), "ExitCode": 3}}

    def remove_container(self, id_: str, **_: object) -> None:
        if id_ not in self.rows:
            raise docker.errors.NotFound(id_)
        self.calls.append(("remove", id_))
        if self.removals_in_progress:
            self.removals_in_progress -= 1
            raise conflict(f"removal of container {id_} is already in progress")
        del self.rows[id_]

    def connect_container_to_network(self, id_: str, network: str) -> None:
        if network == "gone":
            raise docker.errors.NotFound(network)
        assert id_ not in self.rows, "it runs already"
        self.calls.append((f"connect {network}", id_))

    def inspect_image(self, name: str) -> dict[str, Any]:
        return {"Id": name, "Config": {}}

    def unpause(self, id_: str) -> None:
        self.calls.append(("unpause", id_))
        self.rows[id_]["State"] = "running"

    @property
    def containers(self) -> Any:
        return Containers(self)


class Containers:
    """`client.containers.create` and, called, `api.containers`."""

    def __init__(self, client: Docker) -> None:
        self._client = client

    def __call__(self, **_: object) -> list[dict[str, Any]]:
        return list(self._client.rows.values())

    def create(self, name: str, labels: dict[str, str], **options: Any) -> Created:
        if any(row["Names"] == [f"/{name}"] for row in self._client.rows.values()):
            raise conflict(f"The container name {name} is already in use")
        self._client.calls.append(("create", name))
        self._client.created.append(Created(self._client, name, labels, options))
        return self._client.created[-1]


class Created:
    def __init__(self, client: Docker, name: str, labels: dict[str, str], options: dict[str, Any]) -> None:
        self._client, self.name, self.labels, self.options = client, name, labels, options
        self.id, self.status = name, "running"

    @property
    def attrs(self) -> dict[str, Any]:
        return self._client.rows[self.name]

    def start(self) -> None:
        if self._client.start_error:
            raise self._client.start_error
        self._client.add(self.name, **{"role": "balancer", **self.labels})

    def reload(self) -> None:
        pass

    def remove(self, **_: object) -> None:
        self._client.calls.append(("remove", self.name))


def conflict(explanation: str) -> docker.errors.APIError:
    response = type("Response", (), {"status_code": 409, "url": "/", "reason": "Conflict"})()
    return docker.errors.APIError("Conflict", response=response, explanation=explanation)


def new_engine(client: Docker, monkeypatch: pytest.MonkeyPatch, **changes: object) -> DockerEngine:
    monkeypatch.setattr(base.docker, "from_env", lambda **_: client)
    return DockerEngine(settings(**changes), BalancerOptions("balancer-image"))


@pytest.fixture
def client() -> Docker:
    return Docker()


@pytest.fixture
def engine(client: Docker, monkeypatch: pytest.MonkeyPatch) -> DockerEngine:
    return new_engine(client, monkeypatch)


def test_missing_balancer_is_created_and_then_runs(engine: DockerEngine, client: Docker) -> None:
    engine.list()
    assert (engine.balancer, engine._check_targets) == (BalancerState.MISSING, [])
    engine.repair_balancer()
    engine.list()
    assert client.calls == [("create", "p-balancer")]
    assert (engine.balancer, engine.balancers) == (BalancerState.RUNNING, {"p-balancer"})
    assert engine._check_targets == [("198.18.0.9", 8000)]


@pytest.mark.parametrize("state", ["exited", "restarting", "created", "dead"])
def test_stopped_balancer_is_replaced(engine: DockerEngine, client: Docker, state: str) -> None:
    engine.repair_balancer()
    client.rows["p-balancer"]["State"] = state
    engine.list()
    assert (engine.balancer, engine.balancers) == (BalancerState.STOPPED, frozenset())
    engine.repair_balancer()
    engine.list()
    assert client.calls[1:] == [("remove", "p-balancer"), ("create", "p-balancer")]
    assert engine.balancer is BalancerState.RUNNING


def test_removal_of_the_balancer_that_is_in_progress_is_waited_for(
    engine: DockerEngine, client: Docker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(docker_engine, "REMOVAL_PAUSE", 0)
    engine.repair_balancer()
    client.rows["p-balancer"]["State"] = "removing"
    client.removals_in_progress = 3
    engine.repair_balancer()
    assert client.calls[1:] == [("remove", "p-balancer")] * 4 + [("create", "p-balancer")]


def test_paused_balancer_is_resumed(engine: DockerEngine, client: Docker) -> None:
    engine.repair_balancer()
    client.rows["p-balancer"]["State"] = "paused"
    engine.list()
    assert engine.balancer is BalancerState.STOPPED
    engine.repair_balancer()
    assert client.calls[1:] == [("unpause", "p-balancer")]


def test_balancer_without_an_address_is_replaced(engine: DockerEngine, client: Docker) -> None:
    engine.repair_balancer()
    client.rows["p-balancer"]["NetworkSettings"]["Networks"] = {}
    engine.list()
    assert engine.balancer is BalancerState.STOPPED


def test_balancer_created_from_other_settings_is_outdated_and_replaced(
    engine: DockerEngine, client: Docker, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine.repair_balancer()
    other = new_engine(client, monkeypatch, port=9000)
    other.list()
    assert other.balancer is BalancerState.OUTDATED
    other.repair_balancer()
    other.list()
    assert other.balancer is BalancerState.RUNNING


def test_balancer_is_replaced_where_the_folder_of_its_token_was_made_again(
    client: Docker, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(Settings, "run_dir", tmp_path)
    token = tmp_path / "secrets" / "balancer" / "token"
    token.parent.mkdir(parents=True)
    token.write_text("one")
    new_engine(client, monkeypatch).repair_balancer()
    assert "one" not in str(client.created[-1].options), "whoever lists containers does not see it"
    token.write_text("two")
    found = new_engine(client, monkeypatch)
    found.list()
    assert found.balancer is BalancerState.RUNNING
    token.parent.rename(tmp_path / "old")
    token.parent.mkdir()
    found = new_engine(client, monkeypatch)
    found.list()
    assert found.balancer is BalancerState.OUTDATED


def test_balancer_that_does_not_start_is_removed_again(engine: DockerEngine, client: Docker) -> None:
    client.start_error = docker.errors.APIError("no", explanation="port is already allocated")
    with pytest.raises(EngineError, match="port is already allocated"):
        engine.repair_balancer()
    assert client.calls == [("create", "p-balancer"), ("remove", "p-balancer")]


def test_foreign_container_with_the_balancers_name_is_not_changed(engine: DockerEngine, client: Docker) -> None:
    client.add("p-balancer", "something else")
    with pytest.raises(NameTaken):
        engine.repair_balancer()
    assert client.calls == []


def test_backends_are_made_from_the_image_that_run_sh_found_whatever_its_name_refers_to_now(
    client: Docker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(base.docker, "from_env", lambda **_: client)
    monkeypatch.setenv("LB_BALANCER_IMAGE", "balancer-image")
    monkeypatch.setenv("LB_IMAGE_ID", "sha256:1")
    engine = script.make_engine(settings(image="web"))
    assert json.loads(engine.spec())["image"] == "sha256:1"


def test_ended_backend_is_listed_with_its_exit_code(engine: DockerEngine, client: Docker) -> None:
    client.add("backend", "backend", state="exited")
    assert [container.exit_code for container in engine.list()] == [3]


def test_backend_without_the_projects_network_is_listed_as_disconnected(engine: DockerEngine, client: Docker) -> None:
    client.add("one", "backend")
    client.add("another", "backend")
    client.rows["another"]["NetworkSettings"]["Networks"] = {"db": {"IPAddress": "198.18.9.2"}}
    assert [(found.ip, found.disconnected) for found in engine.list()] == [("198.18.0.9", False), ("", True)]


def test_balancer_on_the_host_reports_under_its_own_name_and_is_tested_at_the_service_port(
    client: Docker, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = new_engine(client, monkeypatch, datapath="host", port="80")
    engine.repair_balancer()
    engine.list()
    assert engine.balancer is BalancerState.RUNNING
    [name] = engine.balancers or ()
    options = client.created[-1].options
    assert name == options["hostname"]
    assert options["network_mode"] == "host"
    assert not options.keys() & {"ports", "sysctls", "network"}
    assert options["environment"]["LB_BRIDGE"] == "br-0123456789ab"
    assert options["cap_add"] == ["NET_ADMIN", "NET_RAW", "NET_BIND_SERVICE"]
    assert engine._check_targets == [("198.18.0.1", 80)]
    # The rules and their counters stay, so its successor continues its reports.
    client.rows.clear()
    engine.repair_balancer()
    assert client.created[-1].options["hostname"] == name


def test_balancer_on_the_host_gets_the_lock_of_iptables_only_as_a_file(
    client: Docker, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """With a volume, Docker would create a directory in place of a missing file, also at the host's next start."""
    lock = tmp_path / "xtables.lock"
    lock.touch()
    monkeypatch.setattr(docker_engine, "XTABLES_LOCK", lock)
    new_engine(client, monkeypatch, datapath="host").repair_balancer()
    options = client.created[-1].options
    assert not any("xtables" in volume for volume in options["volumes"])
    assert options["mounts"] == [{"Target": str(lock), "Source": str(lock), "Type": "bind", "ReadOnly": False}]
    lock.unlink()
    new_engine(client, monkeypatch, datapath="host").repair_balancer()
    assert client.created[-1].options["mounts"] == []


@pytest.mark.parametrize(("ports", "needed"), [({}, False), ({"port": "80"}, True), ({"manager_port": "500"}, True)])
def test_balancer_on_the_host_may_bind_ports_below_1024_only_if_it_has_some(
    client: Docker, monkeypatch: pytest.MonkeyPatch, ports: dict[str, str], needed: bool
) -> None:
    new_engine(client, monkeypatch, datapath="host", **ports).repair_balancer()
    assert ("NET_BIND_SERVICE" in client.created[-1].options["cap_add"]) == needed


@pytest.mark.parametrize(("datapath", "ports"), [("bridge", "8000:8080,8001:8443"), ("host", "80:8080,443:8443")])
def test_balancer_gets_all_ports_of_the_service(
    client: Docker, monkeypatch: pytest.MonkeyPatch, datapath: str, ports: str
) -> None:
    engine = new_engine(client, monkeypatch, datapath=datapath, publish="80:8080 443:8443", sticky="60")
    engine.repair_balancer()
    options = client.created[-1].options
    assert options["environment"]["LB_PORTS"] == ports
    assert options["environment"]["LB_STICKY"] == "60"
    if datapath == "bridge":
        assert options["ports"] == {"8000/tcp": ("0.0.0.0", 80), "8001/tcp": ("0.0.0.0", 443)}


# -- backends ---------------------------------------------------------------------------------------------------------


def test_backend_joins_the_attached_networks_before_it_starts(client: Docker, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = new_engine(client, monkeypatch, image="web", attach="db cache")
    launched = engine.launch("p-backend-1", engine.spec())
    assert [call for call, _ in client.calls] == ["create", "connect db", "connect cache"]
    assert launched.ip == "198.18.0.9", "that of the project's network"
    assert client.created[0].options["network"] == "p"


def test_backend_that_cannot_join_a_network_is_removed_again(client: Docker, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = new_engine(client, monkeypatch, image="web", attach="gone")
    with pytest.raises(EngineError, match="gone"):
        engine.launch("p-backend-1", engine.spec())
    assert client.calls == [("create", "p-backend-1"), ("remove", "p-backend-1")]


def test_values_of_an_env_file_are_in_the_environment_and_not_in_the_spec(
    client: Docker, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    file = tmp_path / "a.env"
    file.write_text("PASSWORD=hunter2\nB=file\n")
    engine = new_engine(client, monkeypatch, image="web", env="B=flag", env_file=str(file))
    spec = engine.spec()
    launched = engine.launch("p-backend-1", spec)
    assert client.created[0].options["environment"] == ["PASSWORD=hunter2", "B=flag"]
    assert "hunter2" not in f"{client.created[0].labels} {launched}"
    file.write_text("PASSWORD=hunter3")
    assert engine.spec() == spec, "the copies that run.sh makes have other names"


def test_labels_of_the_user_do_not_replace_those_of_the_project(
    client: Docker, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = new_engine(client, monkeypatch, image="web", label="tier=web")
    spec = engine.spec()
    engine.launch("p-backend-1", spec)
    own = {"lbscaler.project": "p", "lbscaler.role": "backend", "lbscaler.spec": spec}
    assert client.created[0].labels == {"tier": "web", **own}


@pytest.mark.parametrize(("allow", "limit"), [("", 128), ("processes", -1)])
def test_number_of_processes_is_limited_unless_it_is_allowed(
    client: Docker, monkeypatch: pytest.MonkeyPatch, allow: str, limit: int
) -> None:
    engine = new_engine(client, monkeypatch, image="web", allow=allow, secret="key=/copies/1")
    engine.launch("p-backend-1", engine.spec())
    options = client.created[0].options
    assert (options["pids_limit"], options["volumes"]) == (limit, ["/copies/1:/run/secrets/key:ro"])


def test_calls_of_all_workers_at_the_same_time_are_not_logged_by_the_http_library(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    calls = 2 * WORKERS + 1  # and the loop's list
    together = threading.Barrier(calls)

    class Slow(FakeEngine):
        def answer(self, method: str, path: str, query: dict[str, str], body: Any) -> tuple[int, Any]:
            if path == "/info":
                together.wait(10)
            return super().answer(method, path, query, body)

    api = Slow(tmp_path)
    api._server.socket.listen(calls)
    monkeypatch.setenv("DOCKER_HOST", f"unix://{api.socket}")
    caplog.set_level(logging.WARNING)
    engine = DockerEngine(settings(), BalancerOptions("balancer-image"))
    with ThreadPoolExecutor(calls) as pool:
        assert len(list(pool.map(lambda _: engine._client.info(), range(calls)))) == calls
    engine._client.close()
    api.close()
    assert caplog.text == ""
