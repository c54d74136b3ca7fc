"""The files of --env-file and --secret: what is read from them, what is refused, and who may read a secret."""

from __future__ import annotations

from pathlib import Path

import pytest

from core.backend_files import check, environment, user_id
from core.settings import SettingError
from fakes import settings


def file(place: Path, content: str | bytes, name: str = "a.env") -> str:
    path = place / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return str(path)


def test_values_are_the_rest_of_their_lines_and_comments_are_skipped(tmp_path: Path) -> None:
    text = '# a comment\n\n  A=one two \r\nB="quoted"\nC=\n   # another\nspring.url=a=b#c\n'
    expected = ["A=one two ", 'B="quoted"', "C=", "spring.url=a=b#c"]
    assert environment([file(tmp_path, text)], []) == expected
    assert environment([file(tmp_path, b"\xef\xbb\xbfA=\xc3\xbc")], []) == ["A=ü"]


def test_later_file_overrides_an_earlier_one_and_a_flag_overrides_both(tmp_path: Path) -> None:
    files = [file(tmp_path, "A=1\nB=1\nC=1", "first"), file(tmp_path, "B=2\nC=2", "second")]
    assert environment(files, ["C=3", "D=3"]) == ["A=1", "B=2", "C=3", "D=3"]


@pytest.mark.parametrize(
    ("content", "line"), [("A=1\nhunter2\n", 2), ("=hunter2", 1), ("A B=hunter2", 1), ("A=hunter2\0", 1)]
)
def test_bad_line_is_reported_by_its_number_alone(tmp_path: Path, content: str, line: int) -> None:
    path = file(tmp_path, content)
    with pytest.raises(SettingError) as caught:
        check(settings(env_file=path))
    allowed = "NAME=VALUE, # and a comment, or nothing"
    assert str(caught.value) == f"--env-file {path}, line {line}; allowed: {allowed}"


def test_file_that_is_no_text_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SettingError, match=r"^a file of --env-file is no text in UTF-8$"):
        check(settings(env_file=file(tmp_path, b"A=hunter2\xff")))


def test_missing_file_is_one_line(tmp_path: Path) -> None:
    there = file(tmp_path, "A=1")
    check(settings(env_file=there, secret=f"a={there}"))
    for name, value in (("env_file", f"{there} {tmp_path}/no"), ("secret", f"a={there} b={tmp_path}/no")):
        with pytest.raises(SettingError) as caught:
            check(settings(**{name: value}))
        assert str(caught.value) == f"cannot read {tmp_path}/no: No such file or directory"


@pytest.mark.parametrize(
    ("image_user", "allow", "uid"),
    [
        *(("", "", 10001), ("root", "", 10001), ("0:0", "", 10001), ("", "root", 0), ("root:adm", "root", 0)),
        *(("1000:0", "", 1000), ("1000", "root", 1000)),
    ],
)
def test_secret_belongs_to_the_user_that_the_backend_runs_as(image_user: str, allow: str, uid: int) -> None:
    assert user_id(settings(allow=allow), image_user) == uid


def test_user_that_only_the_image_knows_has_no_number() -> None:
    assert user_id(settings(), "www-data") is None
