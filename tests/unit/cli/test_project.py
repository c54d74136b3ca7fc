"""The project's files."""

from __future__ import annotations

import resource
import signal
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import MagicMock, Mock

import docker.errors
import pytest

from cli import down, up
from cli.output import Failed, Output
from cli.project import Project, write


def test_file_is_replaced_with_mode_0600(tmp_path: Path) -> None:
    path = tmp_path / "settings.json"
    path.write_text("old")
    write(path, "new")
    assert (path.read_text(), path.stat().st_mode & 0o777) == ("new", 0o600)
    assert list(tmp_path.iterdir()) == [path]


def test_engine_that_cannot_be_reached_is_no_traceback(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(docker, "from_env", Mock(side_effect=docker.errors.DockerException("no such file")))
    with Output(tmp_path / "log") as out, pytest.raises(Failed, match="no Docker Engine answers: no such file"):
        _ = Project("p", out).docker


def test_starts_of_two_projects_may_write_their_links_at_the_same_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(up, "ROOT", tmp_path)
    (tmp_path / "balancer").mkdir()

    def write_links(name: str) -> None:
        run_dir = tmp_path / "run" / name
        run_dir.mkdir(parents=True)
        start = SimpleNamespace(run_dir=run_dir, project=SimpleNamespace(name=name))
        for _ in range(300):
            up.Start._write_run_time_files(start, "198.18.0.1:5000\n")  # type: ignore[arg-type]

    with ThreadPoolExecutor() as pool:
        list(pool.map(write_links, ("p", "q")))
    assert {path.name for path in (tmp_path / "balancer").iterdir()} == {"ip.txt", "hostip.txt"}


def test_network_that_a_swarm_still_lists_is_not_removed_for_ever() -> None:
    network = Mock(attrs={"Driver": "overlay"})
    network.remove.side_effect = docker.errors.NotFound("no such network")
    project = MagicMock()
    project.network.return_value = network
    assert not down._remove_network(project)


def test_content_may_be_bytes(tmp_path: Path) -> None:
    write(tmp_path / "key", b"\x00\xff")
    assert (tmp_path / "key").read_bytes() == b"\x00\xff"


def test_file_that_cannot_be_written_keeps_its_text(tmp_path: Path) -> None:
    path = tmp_path / "settings.json"
    path.write_text("old")
    (tmp_path / "settings.json.new").mkdir()
    with pytest.raises(Failed, match=r"cannot write .*settings\.json: Is a directory"):
        write(path, "new")
    assert path.read_text() == "old"


def test_text_that_does_not_fit_on_the_disk_leaves_the_old_one(tmp_path: Path) -> None:
    path = tmp_path / "settings.json"
    path.write_text("old")
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1]))
    try:
        with pytest.raises(Failed, match=r"settings\.json: File too large"):
            write(path, "x" * 200)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert path.read_text() == "old"
