"""The Swarm engine over an API in memory: its services, its list of tasks, updates, failed updates and claims."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import docker.errors
import pytest

from core.engine import BalancerState, EngineError, TakenOver
from engines import base, swarm_claim
from engines.options import BalancerOptions
from engines.swarm_backends import task_label, task_template
from engines.swarm_engine import SwarmEngine
from fakes import settings

SECOND = 10**9
SECRETS = ("p-token", "p-certificate-1")


def test_task_has_least_privilege_the_drain_timeout_as_its_grace_period_and_the_options_of_the_settings() -> None:
    made = task_template(
        settings(
            drain_timeout=7, env="A=1", command="serve 'two words'", memory="64m", cpus="0.5", tmpfs="/run",
            volume="/srv:/srv data:/data:rw", constraint="node.role==worker", spread="node.labels.zone",
        ),
        "image", "",
    )  # fmt: skip
    container = made["ContainerSpec"]
    assert container["CapabilityDrop"] == ["ALL"]
    assert (container["User"], container["ReadOnly"], container["StopGracePeriod"]) == ("10001:10001", True, 7 * SECOND)
    assert (container["Image"], container["Args"], container["Env"]) == (
        "image",
        ["serve", "two words"],
        ["LINGER=3", "A=1"],
    )
    assert [(m["Type"], m["Target"], m.get("ReadOnly")) for m in container["Mounts"]] == [
        ("tmpfs", "/tmp", None),
        ("tmpfs", "/run", None),
        ("bind", "/srv", True),
        ("volume", "/data", False),
    ]
    assert made["Resources"]["Limits"] == {"MemoryBytes": 64 << 20, "Pids": 128, "NanoCPUs": SECOND // 2}
    assert made["Placement"] == {
        "Constraints": ["node.role==worker"],
        "Preferences": [{"Spread": {"SpreadDescriptor": "node.labels.zone"}}],
    }
    assert made["Networks"] == [{"Target": "p"}]


def test_rule_that_the_settings_lift_is_not_in_the_task() -> None:
    container = task_template(settings(allow="root,capabilities,write"), "image", "")["ContainerSpec"]
    assert not {"User", "CapabilityDrop"} & container.keys()
    assert container["ReadOnly"] is False


def test_task_of_an_application_with_neighbours(tmp_path: Path) -> None:
    file = tmp_path / "a.env"
    file.write_text("A=file\nB=file\n")
    reference = {"SecretID": "1"}
    made = task_template(
        settings(
            attach="db", env="A=flag", env_file=str(file), add_host="db:198.18.0.9", label="tier=web",
            ulimit="nofile=1024", allow="processes",
        ),
        "image", "", [reference],
    )  # fmt: skip
    container = made["ContainerSpec"]
    assert made["Networks"] == [{"Target": "p"}, {"Target": "db"}]
    assert container["Env"] == ["LINGER=3", "A=flag", "B=file"]
    assert container["Hosts"] == ["198.18.0.9 db"]
    assert container["Labels"] == {"tier": "web", "lbscaler.project": "p", "lbscaler.role": "backend"}
    assert container["Ulimits"] == [{"Name": "nofile", "Soft": 1024, "Hard": 1024}]
    assert container["Secrets"] == [reference]
    assert "Pids" not in made["Resources"]["Limits"]


def test_options_that_are_not_set_are_not_in_the_task() -> None:
    container = task_template(settings(), "image", "")["ContainerSpec"]
    assert not container.keys() & {"Hosts", "Ulimits", "Secrets"}


class Api:
    """Docker's API in memory, as far as the Swarm engine calls it."""

    def __init__(self) -> None:
        self.service: dict[str, Any] | None = None
        self.balancer: dict[str, Any] | None = None
        self.balancer_tasks: list[dict[str, Any]] = []
        self.listed: list[dict[str, Any]] = []
        self.down: set[str] = set()
        self.labels: dict[str, dict[str, str]] = {}
        self.races = 0
        self.updates = 0
        self.update_error = ""
        self.update_action = ""

    def inspect_service(self, name: str) -> dict[str, Any]:
        found = self.balancer if name == "p-balancer" else self.service
        if found is None:
            raise docker.errors.NotFound(name)
        return json.loads(json.dumps(found))  # type: ignore[no-any-return]

    def create_service(self, task_template: dict[str, Any], **arguments: Any) -> None:
        spec = {
            "Name": arguments["name"],
            "Labels": arguments["labels"],
            "Mode": arguments["mode"],
            "TaskTemplate": task_template,
        }
        if arguments["name"] == "p-balancer":
            self.balancer = {"ID": "b", "Version": {"Index": 1}, "Spec": spec}
            return
        assert arguments["endpoint_spec"] == {"Mode": "dnsrr"}
        self.service = {"ID": "s", "Version": {"Index": 1}, "Spec": spec}

    def update_service(self, id_: str, version: int, **arguments: Any) -> None:
        if self.update_error:
            raise docker.errors.APIError(self.update_error)
        if id_ == "b":
            assert self.balancer is not None
            self.balancer["UpdateStatus"] = None
            self.balancer["Spec"]["Labels"] = arguments["labels"]
            self.balancer["Spec"]["TaskTemplate"] = arguments["task_template"]
            self.balancer["Version"]["Index"] += 1
            assert arguments["update_config"]["Parallelism"] == 1
            return
        assert self.service is not None
        if self.races:
            self.races -= 1
            self.service["Version"]["Index"] += 1
        if version != self.service["Version"]["Index"]:
            raise docker.errors.APIError("rpc error: code = Unknown desc = update out of sequence")
        self.updates += 1
        names = {"TaskTemplate": "task_template", "Name": "name", "Labels": "labels", "Mode": "mode"}
        self.service["Spec"] = {key: arguments[name] for key, name in names.items()}
        self.service["Version"]["Index"] += 1
        self.service["UpdateStatus"] = None
        self.update_action = arguments["update_config"]["FailureAction"]

    def tasks(self, filters: dict[str, str]) -> list[dict[str, Any]]:
        return {"s": self.listed, "b": self.balancer_tasks}[filters["service"]]

    def secrets(self) -> list[dict[str, Any]]:
        return [{"ID": f"id of {name}", "Spec": {"Name": name}} for name in SECRETS]

    def nodes(self) -> list[dict[str, Any]]:
        return [self.inspect_node(name) for name in ("n1", "n2")]

    def inspect_node(self, name: str) -> dict[str, Any]:
        spec = {"Role": "manager", "Labels": self.labels.get(name, {"zone": "a"})}
        state = "down" if name in self.down else "ready"
        address = {"n1": "198.18.0.1", "n2": "198.18.0.2"}[name]
        return {"ID": name, "Version": {"Index": 1}, "Spec": spec, "Status": {"State": state, "Addr": address}}

    def update_node(self, name: str, version: int, spec: dict[str, Any]) -> None:
        assert (version, spec["Role"], spec["Labels"]["zone"]) == (1, "manager", "a"), "nothing else is changed"
        self.labels[name] = spec["Labels"]


def attachment(network: str, address: str) -> dict[str, Any]:
    return {"Network": {"Spec": {"Name": network}}, "Addresses": [address]}


def labelled(spec: str) -> dict[str, Any]:
    """The service's template of tasks created from this spec."""
    template: dict[str, Any] = json.loads(spec)
    template["ContainerSpec"]["Labels"]["lbscaler.template"] = task_label(spec)
    return template


def task(
    id_: str,
    state: str = "running",
    desired: str = "running",
    node: str = "n1",
    slot: int = 1,
    spec: dict[str, Any] | None = None,
) -> dict[str, Any]:
    return {
        "Spec": spec or {"ContainerSpec": {}},
        "ID": id_,
        "Slot": slot,
        "NodeID": node,
        "DesiredState": desired,
        "Status": {"State": state, "ContainerStatus": {"ExitCode": 3}},
        "NetworksAttachments": [attachment("db", f"198.18.9.{slot}/24"), attachment("p", f"198.18.0.{slot + 1}/20")],
    }


@pytest.fixture(autouse=True)
def log_from_warning(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("WARNING", "manager")


class Client:
    def __init__(self, node: str) -> None:
        self.api, self.node = Api(), node

    def info(self) -> dict[str, Any]:
        return {"Swarm": {"NodeID": self.node, "NodeAddr": "198.18.0.1"}}


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> SwarmEngine:
    monkeypatch.setattr(base.docker, "from_env", lambda **_: Client("n1"))
    return new_engine()


def new_engine(api: Api | None = None, node: str = "n1", **changes: object) -> SwarmEngine:
    """An engine on that node of the Swarm behind `api`; without one, of a new Swarm."""
    made = SwarmEngine(settings(**changes), BalancerOptions("balancer-image", secrets=SECRETS))
    made._client.api = api or Api()
    made._client.node = node
    return made


def api(engine: SwarmEngine) -> Api:
    made: Api = engine._client.api
    return made


def test_secret_of_a_backend_belongs_to_its_user(engine: SwarmEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = new_engine(image="web", secret="key=/copies/certificate-1")
    described = {"Id": "sha256:3", "Config": {"User": "1000:0"}}
    monkeypatch.setattr(engine._client.api, "inspect_image", lambda _: described, raising=False)
    assert json.loads(engine.spec())["ContainerSpec"]["Secrets"] == [
        {
            "SecretID": "id of p-certificate-1",
            "SecretName": "p-certificate-1",
            "File": {"Name": "key", "UID": "1000", "GID": "1000", "Mode": 0o400},
        }
    ]


SPEC, OTHER = (json.dumps({"ContainerSpec": {"Image": image, "Labels": {}}}) for image in "ab")


def test_resize_creates_the_service_and_later_changes_its_number_of_tasks(engine: SwarmEngine) -> None:
    assert engine.list() == []
    assert engine.replicas == 0
    engine.resize(3, SPEC)
    engine.list()
    assert (engine.replicas, api(engine).updates) == (3, 0)
    engine.resize(5, SPEC)
    engine.list()
    assert (engine.replicas, api(engine).updates) == (5, 1)


def test_digest_in_use_stays_where_the_same_image_has_another_digest_too(
    engine: SwarmEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = new_engine(registry="198.18.0.254:5000", image="198.18.0.254:5000/web:1")
    here, in_use, foreign = (f"198.18.0.254:5000/web@sha256:{digit * 64}" for digit in "012")
    described = {"Id": "sha256:3", "RepoDigests": [here, in_use], "Config": {}}
    monkeypatch.setattr(engine._client.api, "inspect_image", lambda _: described, raising=False)

    def image() -> str:
        return str(json.loads(engine.spec())["ContainerSpec"]["Image"])

    assert image() == here
    engine.resize(3, engine.spec().replace(here, in_use))
    assert image() == in_use
    engine.resize(3, engine.spec().replace(in_use, foreign))
    assert image() == here, "it is another image"


def test_update_that_another_one_overtook_is_tried_again_a_limited_number_of_times(engine: SwarmEngine) -> None:
    engine.resize(3, SPEC)
    api(engine).races = 3
    engine.resize(4, SPEC)
    engine.list()
    assert engine.replicas == 4
    api(engine).races = 1000
    with pytest.raises(EngineError, match="out of sequence"):
        engine.resize(5, SPEC)


def test_manager_that_started_last_controls_the_fleet_and_the_other_one_raises_taken_over(engine: SwarmEngine) -> None:
    engine.resize(3, SPEC)
    engine.list()
    another = new_engine(api=api(engine), node="n2")
    another.list()
    another.resize(4, SPEC)
    for call in (engine.list, lambda: engine.resize(2, SPEC)):
        with pytest.raises(TakenOver, match="has taken over; this one ends"):
            call()
    another.list()
    assert another.replicas == 4


def test_foreign_service_with_the_backends_name_is_not_changed(engine: SwarmEngine) -> None:
    engine.resize(3, SPEC)
    foreign = api(engine).service
    assert foreign is not None
    foreign["Spec"]["Labels"] = {"lbscaler.project": "another"}
    for call in (engine.list, lambda: engine.resize(1, SPEC)):
        with pytest.raises(EngineError, match="not ours"):
            call()
    assert foreign["Spec"]["Mode"] == {"Replicated": {"Replicas": 3}}


def set_wanted_spec(engine: SwarmEngine, spec: str) -> None:
    """As `engine.spec()` does with an image that leads to this spec."""
    engine._wanted_spec = spec


def test_backends_of_the_old_spec_are_listed_as_such_until_swarm_has_replaced_them(engine: SwarmEngine) -> None:
    set_wanted_spec(engine, SPEC)
    engine.resize(2, SPEC)
    api(engine).listed = [task("t1", spec=labelled(SPEC)), task("t2", spec=labelled(SPEC))]
    assert [c.spec == SPEC for c in engine.list()] == [True, True]
    set_wanted_spec(engine, OTHER)
    engine.resize(2, OTHER)
    assert [c.spec == OTHER for c in engine.list()] == [False, False]
    assert engine.made_from == OTHER, "so the plan does not resize again"
    api(engine).listed[0] = task("t3", spec=labelled(OTHER))
    assert [c.spec == OTHER for c in engine.list()] == [True, False]


def pause_update(service: dict[str, Any] | None) -> dict[str, Any]:
    """As Swarm does when a new task fails. Any update of the service ends it."""
    assert service is not None
    service["UpdateStatus"] = {"State": "paused"}
    service["Version"]["Index"] += 1
    return service


@pytest.fixture
def updated(engine: SwarmEngine) -> SwarmEngine:
    """Swarm is replacing two tasks of SPEC by tasks of OTHER."""
    set_wanted_spec(engine, SPEC)
    engine.resize(2, SPEC)
    set_wanted_spec(engine, OTHER)
    engine.resize(2, OTHER)
    return engine


def test_update_that_swarm_paused_is_undone_and_not_tried_again(
    updated: SwarmEngine, caplog: pytest.LogCaptureFixture
) -> None:
    assert api(updated).update_action == "pause"
    service = pause_update(api(updated).service)
    api(updated).listed = [task("t1", spec=labelled(SPEC))]
    updated.list()
    assert service["Spec"]["TaskTemplate"] == labelled(SPEC)
    assert [c.spec for c in updated.list()] == [OTHER], "for the plan, the update is done"
    updated.resize(4, OTHER)
    assert service["Spec"]["TaskTemplate"] == labelled(SPEC)
    assert service["Spec"]["Mode"] == {"Replicated": {"Replicas": 4}}
    assert caplog.messages == ["update given up, going back: Swarm paused it, its backends did not stay up"]

    restarted = new_engine(api=api(updated))
    restarted.refused = updated.refused  # the manager keeps it in a file
    set_wanted_spec(restarted, OTHER)
    assert [c.spec for c in restarted.list()] == [OTHER]
    restarted.resize(3, OTHER)
    assert service["Spec"]["TaskTemplate"] == labelled(SPEC)


def test_failed_update_is_undone_later_if_swarm_refuses_that_at_first(updated: SwarmEngine) -> None:
    service = pause_update(api(updated).service)
    api(updated).update_error = "rpc error: code = DeadlineExceeded"
    with pytest.raises(EngineError):
        updated.list()
    api(updated).update_error = ""
    updated.list()
    assert service["Spec"]["TaskTemplate"] == labelled(SPEC)


def test_change_of_the_number_does_not_resume_a_failed_update(updated: SwarmEngine) -> None:
    service = pause_update(api(updated).service)
    updated.resize(3, OTHER)
    assert service["Spec"]["TaskTemplate"] == labelled(SPEC)
    assert service["Spec"]["Mode"] == {"Replicated": {"Replicas": 3}}


def test_manager_that_starts_during_an_update_does_not_try_it_again_after_it_failed(updated: SwarmEngine) -> None:
    restarted = new_engine(api=api(updated))
    set_wanted_spec(restarted, OTHER)
    service = pause_update(api(updated).service)
    restarted.list()
    restarted.resize(2, OTHER)
    assert service["Spec"]["TaskTemplate"] == labelled(SPEC)


THIRD = json.dumps({"ContainerSpec": {"Image": "c", "Labels": {}}})


@pytest.mark.parametrize("undone", [True, False])
def test_update_after_a_failed_one_is_tried(updated: SwarmEngine, undone: bool) -> None:
    service = pause_update(api(updated).service)
    if undone:
        updated.list()
    restarted = new_engine(api=api(updated))
    set_wanted_spec(restarted, THIRD)
    restarted.list()
    restarted.resize(2, THIRD)
    assert service["Spec"]["TaskTemplate"] == labelled(THIRD)
    assert service["Spec"]["Labels"]["lbscaler.before"] == SPEC, "never the failed one"
    assert restarted.refused == ""


def test_update_that_swarm_does_not_accept_at_first_is_tried_again(updated: SwarmEngine) -> None:
    service = pause_update(api(updated).service)
    updated.list()
    restarted = new_engine(api=api(updated))
    set_wanted_spec(restarted, THIRD)
    api(updated).update_error = "rpc error: code = DeadlineExceeded"
    with pytest.raises(EngineError):
        restarted.resize(2, THIRD)
    api(updated).update_error = ""
    restarted.list()
    restarted.resize(2, THIRD)
    assert service["Spec"]["TaskTemplate"] == labelled(THIRD)


def test_return_to_the_previous_spec_continues_when_swarm_pauses_it(updated: SwarmEngine) -> None:
    service = pause_update(api(updated).service)
    updated.list()
    refused = updated.refused
    pause_update(service)
    updated.list()
    assert service["UpdateStatus"] is None
    assert service["Spec"]["TaskTemplate"] == labelled(SPEC)
    assert updated.refused == refused


# -- the balancers ----------------------------------------------------------------------------------------------------


def balancer_task(container: str, node: str = "n1", state: str = "running", desired: str = "running") -> dict[str, Any]:
    status = {"State": state, "ContainerStatus": {"ContainerID": container * 64}}
    spec = {"ContainerSpec": {}}
    return {"ID": container, "NodeID": node, "DesiredState": desired, "Status": status, "Spec": spec}


def test_missing_service_of_balancers_is_created(engine: SwarmEngine) -> None:
    engine.list()
    assert (engine.balancer, engine.balancers) == (BalancerState.MISSING, frozenset())
    engine.repair_balancer()
    engine.list()
    assert engine.balancer is BalancerState.RUNNING
    made = api(engine).balancer
    assert made is not None
    container = made["Spec"]["TaskTemplate"]["ContainerSpec"]
    assert container["CapabilityDrop"] == ["ALL"]
    assert container["ReadOnly"]
    assert "LB_MANAGERS=198.18.0.1:5000,198.18.0.2:5000" in container["Env"]
    secrets = [(secret["SecretID"], secret["File"]["Name"]) for secret in container["Secrets"]]
    assert secrets == [("id of p-token", "token"), ("id of p-certificate-1", "certificate.pem")]
    assert "the token" not in json.dumps(made), "the token is a secret, and not for `docker service inspect`"


def test_service_of_balancers_with_other_settings_is_updated_in_place(engine: SwarmEngine) -> None:
    engine.list()
    engine.repair_balancer()
    other = new_engine(api=api(engine), port=9000)
    other.list()
    assert other.balancer is BalancerState.OUTDATED
    other.repair_balancer()
    other.list()
    assert other.balancer is BalancerState.RUNNING
    made = api(engine).balancer
    assert made is not None
    assert made["Version"]["Index"] == 2, "updated in place, which Swarm does one node at a time"


def test_paused_update_of_the_balancers_is_resumed(engine: SwarmEngine) -> None:
    engine.list()
    engine.repair_balancer()
    service = pause_update(api(engine).balancer)
    api(engine).balancer_tasks = [balancer_task("a"), balancer_task("b", state="starting")]
    engine.list()
    assert engine.balancer is BalancerState.RUNNING, "to resume it now would end the balancer of another node"
    api(engine).balancer_tasks = [balancer_task("a"), balancer_task("b")]
    engine.list()
    assert engine.balancer is BalancerState.OUTDATED, "some nodes have the old settings"
    engine.repair_balancer()
    assert service["UpdateStatus"] is None
    engine.list()
    assert engine.balancer is BalancerState.RUNNING


def test_foreign_service_with_the_balancers_name_is_not_changed(engine: SwarmEngine) -> None:
    foreign = {"ID": "b", "Version": {"Index": 1}, "Spec": {"Labels": {}}}
    api(engine).balancer = foreign
    for call in (engine.list, engine.repair_balancer):
        with pytest.raises(EngineError, match="not ours"):
            call()
    assert foreign["Version"] == {"Index": 1}


def test_running_balancer_is_listed_until_its_node_is_down(engine: SwarmEngine) -> None:
    engine.list()
    engine.repair_balancer()
    api(engine).balancer_tasks = [
        balancer_task("a"),
        balancer_task("b", node="n2"),
        balancer_task("c", state="failed"),
        balancer_task("d", desired="shutdown"),
    ]
    engine.list()
    assert engine.balancers == {"a" * 12, "b" * 12, "d" * 12}
    assert list(engine._check_targets) == [("198.18.0.1", 8000), ("198.18.0.2", 8000)]
    api(engine).down = {"n2"}
    engine.list()
    assert engine.balancers == {"a" * 12, "d" * 12}


def test_data_path_is_checked_while_the_engine_is_unreachable(
    engine: SwarmEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert engine.gateway() == "198.18.0.1"  # as when the manager starts

    def unreachable() -> None:
        raise docker.errors.APIError("connection refused")

    monkeypatch.setattr(engine._client, "info", unreachable)
    assert engine.check_path() == {}


def test_missing_secrets_are_named_in_the_error(engine: SwarmEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Api, "secrets", lambda _: [])
    with pytest.raises(EngineError, match=r"no secret p-token, p-certificate-1; ./run.sh makes it"):
        engine.list()


def test_task_is_listed_while_it_runs_and_once_more_when_it_has_ended(engine: SwarmEngine) -> None:
    engine.resize(2, SPEC)
    api(engine).listed = [task("aaaaaaa", "preparing"), task("bbbbbbb", slot=2), task("ccccccc", "failed", slot=3)]
    (only,) = engine.list()
    assert (only.name, only.ip, only.status, only.node, only.stopping) == (
        "p-backend-2.bbbbb",
        "198.18.0.3",
        "running",
        "n1",
        False,
    )
    api(engine).listed = [task("bbbbbbb", desired="shutdown", slot=2)]
    assert [c.stopping for c in engine.list()] == [True]
    api(engine).listed = [task("bbbbbbb", "failed", "shutdown", slot=2)]
    assert [(c.ended, c.exit_code) for c in engine.list()] == [(True, 3)]
    assert engine.list() == []


def test_stopping_task_on_a_node_that_is_down_is_not_listed(engine: SwarmEngine) -> None:
    engine.resize(2, SPEC)
    api(engine).listed = [task("a", node="n2"), task("b", desired="shutdown", node="n2"), task("c", desired="shutdown")]
    api(engine).down = {"n2"}
    assert [c.id for c in engine.list()] == ["a", "c"]


def rejected(id_: str, error: str) -> dict[str, Any]:
    made = task(id_, "rejected", slot=4)
    made["Status"]["Err"] = error
    return made


def test_error_of_tasks_is_logged_once_with_the_flag_that_may_help(
    engine: SwarmEngine, caplog: pytest.LogCaptureFixture
) -> None:
    engine.resize(2, SPEC)
    api(engine).listed = [rejected("xxxxxxx", "No such image: nowhere")]
    engine.list()
    engine.list()
    assert caplog.messages == ["task p-backend-4.xxxxx ended: No such image: nowhere"]
    api(engine).listed += [rejected("zzzzzzz", "No such image: nowhere")]
    engine.list()
    assert len(caplog.messages) == 1, "Swarm starts such a task every second"
    api(engine).listed += [rejected("yyyyyyy", "mkdir: Read-only file system")]
    engine.list()
    assert "--allow write" in caplog.messages[-1]


def test_error_that_no_listed_task_has_is_forgotten(engine: SwarmEngine) -> None:
    engine.resize(2, SPEC)
    for n in range(5):
        api(engine).listed = [rejected(f"task{n}", f"No such image: {n}")]
        engine.list()
    assert engine._logged_errors == {"No such image: 4"}


def test_claim_with_the_higher_number_is_newer_and_an_invalid_label_is_the_oldest_claim() -> None:
    assert swarm_claim.parse_claim("12 vm, pid 3") < swarm_claim.parse_claim("13 a")
    assert swarm_claim.parse_claim("") == swarm_claim.parse_claim("x y") == (0, "")
