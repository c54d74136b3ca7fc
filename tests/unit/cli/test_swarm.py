"""The secrets that run.sh shares with a Swarm's balancers, with a fake engine that is a manager of a Swarm."""

from __future__ import annotations

import base64
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from unittest.mock import Mock

import pytest

from cli import project as project_module
from cli import swarm
from cli.output import Failed, Output, Undo
from cli.project import Project, keep
from fakes_engine import FakeEngine


@pytest.fixture
def engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeEngine]:
    if shutil.which("openssl") is None:
        pytest.skip("needs openssl")
    (tmp_path / "state").mkdir()
    made = FakeEngine(tmp_path / "state")
    made.swarm = {"LocalNodeState": "active", "ControlAvailable": True, "NodeID": "this-node", "NodeAddr": "198.18.0.1"}
    monkeypatch.setenv("DOCKER_HOST", f"unix://{made.socket}")
    yield made
    made.close()


def node(place: Path, monkeypatch: pytest.MonkeyPatch) -> Project:
    """The project on a node whose checkout is at `place`."""
    monkeypatch.setattr(project_module, "ROOT", place)
    made = Project("p", Output(place / "log"))
    made.run_dir.mkdir(parents=True, exist_ok=True)
    return made


@pytest.fixture
def first(engine: FakeEngine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Project]:
    made = node(tmp_path / "first", monkeypatch)
    yield made
    made.docker.close()
    made.output.log.close()


@pytest.fixture
def second(engine: FakeEngine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Project]:
    made = node(tmp_path / "second", monkeypatch)
    yield made
    made.docker.close()
    made.output.log.close()


def share(project: Project) -> dict[str, str]:
    """As a start does, which then writes the files."""
    names = swarm.share_secrets(project, "image", False, Undo(project.output))
    project.write_secrets()
    return names


def text(engine: FakeEngine, name: str) -> str:
    return base64.b64decode(engine.secrets[name]["Spec"]["Data"]).decode()


def test_balancers_get_the_certificate_and_never_the_key(engine: FakeEngine, first: Project) -> None:
    names = share(first)
    token, certificate = names["token"], names["certificate.pem"]
    assert text(engine, token) == (first.run_dir / "token").read_text()
    assert text(engine, certificate) == (first.run_dir / "certificate.pem").read_text()
    assert swarm.variables(names) == {"LB_TOKEN_SECRET": token, "LB_CERTIFICATE_SECRET": certificate}
    for name in (token, certificate):
        assert "PRIVATE KEY" not in text(engine, name)
    both = (first.run_dir / "manager.pem").read_text()
    assert ("PRIVATE KEY" in both, "BEGIN CERTIFICATE" in both) == (True, True)
    assert (first.run_dir / "manager.pem").stat().st_mode & 0o777 == 0o600
    assert share(first) == names
    assert [re.sub("[0-9a-f]{8}$", "DIGEST", name) for name in sorted(engine.secrets)] == [
        "p-certificate-DIGEST",
        "p-manager-DIGEST",
        "p-token-DIGEST",
    ]
    assert engine.services == [], "nothing had to be fetched"


def test_manager_on_another_node_uses_the_same_token_key_and_certificate(
    engine: FakeEngine, first: Project, second: Project
) -> None:
    names = share(first)
    assert share(second) == names
    for name in ("token", "manager.pem", "certificate.pem"):
        assert (second.run_dir / name).read_text() == (first.run_dir / name).read_text()
    for name in ("token", "manager.pem"):
        assert (second.run_dir / name).stat().st_mode & 0o777 == 0o600
    (service,) = engine.services
    assert service["TaskTemplate"]["Placement"]["Constraints"] == ["node.id==this-node"]
    assert engine.running_services == [], "the service that had the secrets is removed"


def test_service_with_the_secrets_is_removed_where_they_cannot_be_read(
    engine: FakeEngine, first: Project, second: Project
) -> None:
    share(first)
    engine.unreadable_secret = "token"
    with pytest.raises(Failed, match="Fetching the project's secrets from the Swarm: failed"):
        share(second)
    assert engine.running_services == []


def test_another_token_than_the_balancers_have_is_refused(engine: FakeEngine, first: Project, second: Project) -> None:
    share(first)
    (second.run_dir / "token").write_text("another")
    with pytest.raises(Failed, match="run/p/token is not the one that this Swarm's balancers have"):
        share(second)


def rotate(project: Project) -> dict[str, str]:
    project.rotate_token()
    names = swarm.share_secrets(project, "image", True, Undo(project.output))
    project.write_secrets()
    return names


def test_rotated_secrets_have_other_names_and_replace_those_before(
    engine: FakeEngine, first: Project, second: Project
) -> None:
    before = share(first)
    old = {file: (first.run_dir / file).read_text() for file in ("token", "manager.pem")}
    after = rotate(first)
    assert not set(before.values()) & set(after.values())
    assert len(engine.secrets) == 6
    assert all((first.run_dir / file).read_text() != text for file, text in old.items())
    swarm.remove_rotated(first, after)
    assert len(engine.secrets) == 3
    assert set(after.values()) == engine.secrets.keys()
    assert share(first) == after, "the next run.sh keeps them"
    assert share(second) == after, "and so does a manager on another node"


def test_rotation_that_is_interrupted_before_the_files_are_written_is_forgotten_by_the_next_run(
    engine: FakeEngine, first: Project, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = share(first)
    files = {file: (first.run_dir / file).read_text() for file in ("token", "manager.pem", "certificate.pem")}
    first.rotate_token()
    swarm.share_secrets(first, "image", True, Undo(first.output))
    assert {file: (first.run_dir / file).read_text() for file in files} == files, "a running manager has these"
    again = node(tmp_path / "first", monkeypatch)
    assert share(again) == before
    swarm.remove_rotated(again, before)
    assert engine.secrets.keys() == set(before.values())
    again.docker.close()
    again.output.log.close()


@pytest.mark.parametrize("written", [False, True])
def test_rotation_that_fails_restores_the_files_and_removes_its_secrets(
    engine: FakeEngine, first: Project, written: bool
) -> None:
    before = share(first)
    files = {file: (first.run_dir / file).read_text() for file in ("token", "manager.pem", "certificate.pem")}
    first.rotate_token()
    with pytest.raises(Failed), Undo(first.output) as undo:
        swarm.share_secrets(first, "image", True, undo)
        if written:
            for file in files:
                keep(first.run_dir / file, undo)
            first.write_secrets()
            assert (first.run_dir / "token").read_text() != files["token"]
        raise Failed("later")
    assert engine.secrets.keys() == set(before.values())
    assert {file: (first.run_dir / file).read_text() for file in files} == files


def test_certificate_that_is_damaged_is_named(engine: FakeEngine, first: Project) -> None:
    share(first)
    (first.run_dir / "manager.pem").write_text("damaged")
    with pytest.raises(Failed, match=r"the certificate manager\.pem cannot be made or read: .*certificate"):
        share(first)


@pytest.mark.parametrize("state", ["ready", "down"])
def test_drain_in_a_swarm_waits_for_the_balancers_of_nodes_that_are_up(
    engine: FakeEngine, first: Project, monkeypatch: pytest.MonkeyPatch, state: str
) -> None:
    monkeypatch.setattr(swarm, "DRAIN_MARGIN", 0.1)
    engine.nodes[0]["Status"] = {"State": state}
    service = Mock(attrs={"Spec": {"TaskTemplate": {}, "Labels": {}}}, id="b", version=1)
    monkeypatch.setattr(first.docker.api, "update_service", Mock())
    service.tasks.return_value = [{"Status": {"State": "running"}, "NodeID": "this-node"}]
    swarm._drain_everywhere(first, service, 0.4)
    assert (service.tasks.call_count > 2) == (state == "ready")


def test_rotated_secret_that_a_service_still_has_is_removed_by_the_next_run(
    engine: FakeEngine, first: Project, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(swarm, "SERVICE_TIMEOUT", 0.3)
    before = share(first)
    engine.secrets_in_use = {before["token"]}
    after = rotate(first)
    swarm.remove_rotated(first, after)
    assert f"The balancers still have {before['token']}; the next run.sh removes" in capsys.readouterr().out
    assert before["token"] in engine.secrets
    engine.secrets_in_use = set()
    swarm.remove_rotated(first, after)
    assert len(engine.secrets) == 3


def test_start_that_failed_leaves_neither_secrets_nor_a_claim(engine: FakeEngine, first: Project) -> None:
    share(first)
    engine.nodes[0]["Spec"] = {"Labels": {"lbscaler.manager.p": "1 a-manager", "zone": "a"}}
    swarm.forget(first)
    assert engine.secrets == {}
    assert engine.nodes[0]["Spec"] == {"Labels": {"zone": "a"}}


@pytest.mark.parametrize(
    ("state", "control", "registry", "line"),
    [
        ("inactive", False, "", "this host is in no Swarm; join one as a manager, or make one with --swarm-init"),
        ("locked", False, "", "this host's state in its Swarm is 'locked', not active; see docker info"),
        ("active", False, "", "this node is a worker of its Swarm; run on a manager of it, or: docker node promote"),
        ("active", True, "", "the Swarm has 2 nodes, which need a registry to get the images from"),
    ],
)
def test_host_that_cannot_control_a_swarm_is_refused(
    engine: FakeEngine, first: Project, state: str, control: bool, registry: str, line: str
) -> None:
    engine.swarm |= {"LocalNodeState": state, "ControlAvailable": control}
    engine.nodes.append({**engine.nodes[0], "ID": "another-node"})
    with pytest.raises(Failed, match=line):
        swarm.join(first, "", registry, may_init=False, undo=Undo(first.output))
