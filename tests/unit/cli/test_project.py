"""The project's files."""

from __future__ import annotations

import resource
import signal
from pathlib import Path

import pytest

from cli.output import Failed
from cli.project import write


def test_file_is_replaced_with_mode_0600(tmp_path: Path) -> None:
    path = tmp_path / "settings.json"
    path.write_text("old")
    write(path, "new")
    assert (path.read_text(), path.stat().st_mode & 0o777) == ("new", 0o600)
    assert list(tmp_path.iterdir()) == [path]


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
