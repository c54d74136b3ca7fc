"""The place of our hooks among the rules of others, and the removal of everything that is ours."""

from __future__ import annotations

import pytest

from fakes_netfilter import FakeNetfilter
from listings import parse_table
from restore import Table, removal, restore

PREFIX = "LB-0a1b2c-"
TABLE = Table("filter", {f"{PREFIX}X": ()}, {"FORWARD": (f"-o br0 -j {PREFIX}X", f"-i br0 -j {PREFIX}X")}, PREFIX)
OURS = list(TABLE.hooks["FORWARD"])
USER, DOCKER, OTHER, UFW = "-j DOCKER-USER", "-j DOCKER-FORWARD", "-j LB-ffffff-X", "-j ufw-before-forward"
EARLIER = f"-j {PREFIX}X"  # a hook of another version


def kernel(*rules: str) -> FakeNetfilter:
    made = FakeNetfilter()
    for rule in rules:
        made.tables["filter"].setdefault(rule.split()[-1], [])
    made.tables["filter"]["FORWARD"] = [(0, rule) for rule in rules]
    return made


def put(made: FakeNetfilter, table: Table = TABLE) -> str:
    text = restore(table, parse_table(made.table("filter")))
    made.apply(text)
    return text


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ([], OURS),
        ([DOCKER, UFW], [*OURS, DOCKER, UFW]),
        ([USER, DOCKER], [USER, *OURS, DOCKER]),
        ([UFW, USER, DOCKER], [UFW, USER, *OURS, DOCKER]),
        ([*OURS, USER, DOCKER], [USER, *OURS, DOCKER]),
        ([USER, DOCKER, *OURS], [USER, *OURS, DOCKER]),
        ([USER, UFW, *OURS], [USER, *OURS, UFW]),
        ([USER, EARLIER, DOCKER], [USER, *OURS, DOCKER]),
        ([USER, *OURS, *OURS], [USER, *OURS]),
        ([USER, OURS[1], OURS[0]], [USER, *OURS]),
    ],
)
def test_hooks_stand_first_or_behind_docker_user(before: list[str], after: list[str]) -> None:
    made = kernel(*before)
    assert put(made)
    assert made.rules("filter", "FORWARD") == after
    assert put(made) == "", "then there is nothing to change"


@pytest.mark.parametrize("before", [[OTHER, *OURS, UFW], [*OURS, OTHER], [USER, OTHER, *OURS, DOCKER]])
def test_hooks_of_other_projects_may_stand_before_ours(before: list[str]) -> None:
    made = kernel(*before)
    assert put(made) == ""


def test_removal_leaves_the_rules_of_others() -> None:
    made = kernel(USER, OTHER, DOCKER)
    put(made)
    made.apply(removal("filter", parse_table(made.table("filter")), PREFIX))
    assert made.rules("filter", "FORWARD") == [USER, OTHER, DOCKER]
    assert f"{PREFIX}X" not in made.tables["filter"]
    assert removal("filter", parse_table(made.table("filter")), PREFIX) == ""
