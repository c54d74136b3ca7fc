"""Images: their tags, the engine's progress, and the base image."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import docker.errors
import pytest

from cli import images
from cli.output import Failed, Output


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(images, "ROOT", tmp_path)
    place = tmp_path / "balancer"
    place.mkdir()
    (place / "requirements.txt").write_text("a==1\n")
    return place


def test_digest_covers_the_sources_but_no_run_time_files(folder: Path) -> None:
    before = images.digest("balancer", "base")
    for name in ("ip.txt", "hostip.txt"):
        (folder / name).write_text("198.18.0.2\n")
    (folder / "__pycache__").mkdir()
    (folder / "__pycache__" / "a.pyc").write_text("compiled")
    (folder / "a link").symlink_to("requirements.txt")
    assert images.digest("balancer", "base") == before
    assert images.tag("balancer", "base") == f"lbscaler-balancer:{before}"


def test_digest_changes_with_a_source_and_with_the_base_image(folder: Path) -> None:
    before = images.digest("balancer", "base")
    assert images.digest("balancer", "another") != before
    (folder / "requirements.txt").write_text("a==2\n")
    assert images.digest("balancer", "base") != before


class Client:
    """An engine with these images; a pull fails, or makes the image appear."""

    def __init__(self, *names: str, pull: str = "") -> None:
        self.api = self
        self.names, self.error = set(names), pull
        self.built: dict[str, Any] = {}

    def inspect_image(self, name: str) -> dict[str, Any]:
        if name not in self.names:
            raise docker.errors.ImageNotFound("no such image")
        return {}

    def pull(self, name: str, **_: object) -> list[dict[str, str]]:
        self.names.add(name)
        return [{"status": "Pulling"}, {"error": self.error}] if self.error else [{"status": "Pulling"}]

    def build(self, **options: Any) -> list[dict[str, str]]:
        self.built = options
        return [{"stream": "Step 1/2"}, {"stream": "\n"}]


@pytest.fixture
def out(tmp_path: Path) -> Iterator[Output]:
    with Output(tmp_path / "log") as made:
        yield made


def test_image_is_built_with_its_label_on_the_base_image(folder: Path, out: Output) -> None:
    client = Client("my/base")
    name = images.build(client, out, "balancer", "my/base")
    assert client.built["tag"] == name
    assert client.built["labels"] == {"lbscaler.image": "balancer"}
    assert client.built["buildargs"] == {"BASE": "my/base"}
    assert client.built["forcerm"], "a build that fails leaves no container"
    assert out.path.read_text() == "Step 1/2\n"
    again = Client(name)
    assert images.build(again, out, "balancer", "my/base") == name
    assert again.built == {}


def test_default_base_that_cannot_be_pulled_is_made_here(
    folder: Path, out: Output, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[Output] = []
    monkeypatch.setattr(images, "_make_base_image", made.append)
    client = Client(pull="no route to host")
    images.build(client, out, "balancer", images.DEFAULT_BASE)
    assert (made, client.built["buildargs"]) == ([out], {"BASE": images.OWN_BASE})
    already = Client(images.OWN_BASE)
    images.build(already, out, "balancer", images.DEFAULT_BASE)
    assert already.built["buildargs"] == {"BASE": images.OWN_BASE}


def test_other_base_that_cannot_be_pulled_is_a_failure(folder: Path, out: Output) -> None:
    with pytest.raises(Failed, match="the base image my/base is not here and cannot be pulled"):
        images.build(Client(pull="denied"), out, "balancer", "my/base")
