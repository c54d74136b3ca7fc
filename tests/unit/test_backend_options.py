"""What a backend's container is created with: least privilege, each rule of it lifted by name alone."""

from __future__ import annotations

import pytest

from engine import advice, options
from fakes import settings

OWN = "mode=1777,uid=10001,gid=10001"
STRICT = {
    "command": None,
    "environment": [],
    "user": "10001:10001",
    "cap_drop": ["ALL"],
    "security_opt": ["no-new-privileges"],
    "read_only": True,
    "tmpfs": {"/tmp": OWN},
    "volumes": [],
    "mem_limit": "256m",
    "nano_cpus": None,
}
ROOTS = ("", "root", "0", "0:0", "root:adm")


def test_least_privilege_is_what_nobody_asked_to_change() -> None:
    assert options(settings(), "") == STRICT


@pytest.mark.parametrize(
    ("rule", "lifted"),
    [
        ("write", {"read_only": False}),
        ("root", {"user": None, "tmpfs": {"/tmp": "mode=1777"}}),
        ("capabilities", {"cap_drop": None}),
        ("privileges", {"security_opt": None}),
        ("write,root", {"read_only": False, "user": None, "tmpfs": {"/tmp": "mode=1777"}}),
    ],
)
def test_each_rule_is_lifted_by_its_name_and_no_other_with_it(rule: str, lifted: dict[str, object]) -> None:
    assert options(settings(allow=rule), "root") == STRICT | lifted


@pytest.mark.parametrize("user", [*ROOTS, "www-data", "999", "1000:0"])
def test_only_an_image_that_would_be_root_runs_as_a_stranger(user: str) -> None:
    assert options(settings(), user)["user"] == ("10001:10001" if user in ROOTS else None)


def test_words_are_quoted_as_in_a_shell() -> None:
    made = options(
        settings(
            env="A=1 'B=two words' C=",
            command="serve --greeting 'hello you'",
            tmpfs="/run /var/cache",
            volume="/srv/a:/a /srv/b:/b:rw named:/c:ro",
            cpus="0.25",
            memory="1g",
        ),
        "",
    )
    assert made == STRICT | {
        "environment": ["A=1", "B=two words", "C="],
        "command": ["serve", "--greeting", "hello you"],
        "tmpfs": dict.fromkeys(("/tmp", "/run", "/var/cache"), OWN),
        "volumes": ["/srv/a:/a:ro", "/srv/b:/b:rw", "named:/c:ro"],
        "nano_cpus": 250_000_000,
        "mem_limit": "1g",
    }


@pytest.mark.parametrize(
    ("words", "flag"),
    [
        ('open() "/run/nginx.pid" failed (30: Read-only file system)', "--tmpfs PATH, or --allow write"),
        ("OSError: [Errno 30] Read-only file system: '/srv/x'", "--allow write"),
        ('open() "/var/log/nginx/error.log" failed (13: Permission denied)', "--allow root"),
        ("chown: changing ownership of 'x': Operation not permitted", "--allow root"),
        ("This program must be root.", "--allow root"),
    ],
)
def test_what_an_image_complains_of_names_the_flag_that_helps(words: str, flag: str) -> None:
    assert flag in advice(words)


def test_no_advice_where_the_words_ask_for_none_and_memory_before_all() -> None:
    assert advice("no such luck") == ""
    assert "--memory" in advice("Permission denied", out_of_memory=True)
