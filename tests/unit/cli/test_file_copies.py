"""The copies of the files of --env-file and --secret, and the Swarm's secrets, with a fake engine."""

from __future__ import annotations

import json
import os
import shlex
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from cli import file_copies
from cli import project as project_module
from cli.output import Failed, Output
from cli.project import Project
from fakes import settings
from fakes_engine import FakeEngine


@pytest.fixture
def engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeEngine]:
    (tmp_path / "state").mkdir()
    made = FakeEngine(tmp_path / "state")
    monkeypatch.setenv("DOCKER_HOST", f"unix://{made.socket}")
    yield made
    made.close()


@pytest.fixture
def project(engine: FakeEngine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Project]:
    monkeypatch.setattr(project_module, "ROOT", tmp_path)
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    monkeypatch.setattr(os, "chown", lambda path, uid, _: owners.append((Path(path).name, uid)))
    owners.clear()
    made = Project("p", Output(tmp_path / "log"))
    made.run_dir.mkdir(parents=True)
    yield made
    made.docker.close()
    made.output.log.close()


owners: list[tuple[str, int]] = []


def image(user: str = "") -> Any:
    return SimpleNamespace(attrs={"Config": {"User": user}})


@pytest.fixture
def files(tmp_path: Path) -> dict[str, str]:
    (tmp_path / "a.env").write_text("A=hunter2\n")
    (tmp_path / "a key").write_bytes(b"\x00\xff")
    return {"env_file": str(tmp_path / "a.env"), "secret": shlex.quote(f"key={tmp_path}/a key")}


def copies(variables: dict[str, str]) -> tuple[Path, Path]:
    (env_file,) = shlex.split(variables["LB_ENV_FILE"])
    (secret,) = shlex.split(variables["LB_SECRET"])
    assert secret.startswith("key=/")
    return Path(env_file), Path(secret.removeprefix("key="))


def test_copies_are_for_their_reader_alone(project: Project, files: dict[str, str]) -> None:
    env_file, secret = copies(file_copies.copy_files(project, settings(**files), image()))
    assert (env_file.read_text(), env_file.stat().st_mode & 0o777) == ("A=hunter2\n", 0o400)
    assert (secret.read_bytes(), secret.stat().st_mode & 0o777) == (b"\x00\xff", 0o400)
    assert owners == [(env_file.name, 0), (secret.name, 10001)]
    assert env_file.parent.stat().st_mode & 0o777 == 0o700
    assert file_copies.copy_files(project, settings(), image()) == {}


def test_copy_has_another_name_for_other_content_another_owner_or_another_token(
    project: Project, files: dict[str, str], tmp_path: Path
) -> None:
    def names(user: str = "") -> tuple[str, str]:
        env_file, secret = copies(file_copies.copy_files(project, settings(**files), image(user)))
        return env_file.name, secret.name

    first = names()
    assert names() == first
    assert [a == b for a, b in zip(names("1000"), first, strict=True)] == [True, False]
    (tmp_path / "a.env").write_text("A=hunter3\n")
    assert [a == b for a, b in zip(names(), first, strict=True)] == [False, True]
    project.rotate_token()
    assert names()[1] != first[1], "a guess cannot be tested without the token"


def test_secret_without_a_reader_is_refused(
    project: Project, files: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(Failed, match="only the image has the number of its user www-data; write USER NUMBER"):
        file_copies.copy_files(project, settings(**files), image("www-data"))
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    with pytest.raises(Failed, match="only root can give files to the backends' user; run as root"):
        file_copies.copy_files(project, settings(**files), image())
    del files["secret"]
    assert file_copies.copy_files(project, settings(**files), image())["LB_SECRET"] == ""


def test_copy_that_no_backend_uses_is_removed(
    project: Project, files: dict[str, str], engine: FakeEngine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file_copies.remove_unused(project, {})  # there are none
    old = file_copies.copy_files(project, settings(**files), image())
    (tmp_path / "a.env").write_text("A=hunter3\n")
    (tmp_path / "a key").write_text("new")
    new = file_copies.copy_files(project, settings(**files), image())
    env_file, secret = copies(old)
    specs = [{"env_file": [str(env_file)]}, {"volumes": [f"{secret}:/run/secrets/key:ro"]}, {}]
    rows = [{"Id": "a", "Labels": {"lbscaler.spec": json.dumps(spec)}} for spec in specs]
    monkeypatch.setattr(type(project.docker.api), "containers", lambda *_, **__: rows)
    file_copies.remove_unused(project, new)
    assert set(project.secrets_dir.iterdir()) == {*copies(new), *copies(old)}
    del rows[1:]
    file_copies.remove_unused(project, new)
    assert set(project.secrets_dir.iterdir()) == {*copies(new), env_file}
    rows.clear()
    file_copies.remove_unused(project, new)
    assert set(project.secrets_dir.iterdir()) == set(copies(new))


def test_swarm_has_a_secret_for_each_content_until_no_service_needs_it(
    project: Project, files: dict[str, str], engine: FakeEngine, tmp_path: Path
) -> None:
    engine.swarm = {"LocalNodeState": "active", "ControlAvailable": True, "NodeID": "this-node"}
    old = copies(file_copies.copy_files(project, settings(orchestrator="swarm", **files), image("1000")))[1].name
    assert {uid for _, uid in owners} == {0}, "each task gets a file of its own"
    (tmp_path / "a key").write_text("new")
    new = file_copies.copy_files(project, settings(orchestrator="swarm", **files), image("1000"))
    file_copies.copy_files(project, settings(orchestrator="swarm", **files), image("1000"))
    assert engine.secrets.keys() == {f"p-{old}", f"p-{copies(new)[1].name}"}
    tasks = {"ContainerSpec": {"Secrets": [{"SecretName": f"p-{old}"}]}}
    labels = project.labels("backend") | {"lbscaler.spec": "{}", "lbscaler.before": json.dumps(tasks)}
    project.docker.services.create("image", name="p-backend", labels=labels)
    file_copies.remove_unused(project, new)
    assert engine.secrets.keys() == {f"p-{old}", f"p-{copies(new)[1].name}"}, "a rollback may use it"
    del engine.services[0]["Labels"]["lbscaler.before"]
    file_copies.remove_unused(project, new)
    assert engine.secrets.keys() == {f"p-{copies(new)[1].name}"}
