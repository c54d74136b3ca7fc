"""Where the host's rules for traffic inside the bridge are inserted."""

from __future__ import annotations

import pytest

from cli import network

USERS, DOCKERS = "-A FORWARD -j DOCKER-USER", "-A FORWARD -j DOCKER-ISOLATION-STAGE-1"


@pytest.mark.parametrize(
    ("rules", "place"),
    [
        ([], 1),
        ([DOCKERS], 1),
        ([USERS, DOCKERS], 2),
        (["-A FORWARD -p udp -j ACCEPT", USERS, DOCKERS], 3),
        # Another project's rule keeps its place behind this one.
        ([USERS, "-A FORWARD -i br-1 -o br-1 -j ACCEPT", DOCKERS], 2),
    ],
)
def test_rule_is_inserted_before_dockers_rules_and_behind_the_users(rules: list[str], place: int) -> None:
    saved = ["*filter", ":FORWARD DROP [0:0]", "-A INPUT -j DROP", *rules, "-A DOCKER-USER -j RETURN", "COMMIT"]
    assert network.place_in("FORWARD", saved) == place


def test_rules_match_only_packets_that_stay_on_the_projects_bridge() -> None:
    for _, chain, *rule in network.host_rules("br-1", "198.18.0.0/20", "shop"):
        words = " ".join(rule)
        assert words.startswith("-i br-1 -s 198.18.0.0/20 -d 198.18.0.0/20 ")
        assert "lbscaler.project=shop" in words, "stop.sh finds the rule by it"
        assert chain == "PREROUTING" or "-o br-1" in words
