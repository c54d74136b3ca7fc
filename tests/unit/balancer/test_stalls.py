"""When the connections of a backend show that it is frozen: every condition, one at a time."""

from __future__ import annotations

from collections.abc import Mapping

import pytest

from stalls import Replies, StallDetector, why


class Fleet:
    """Backends a to e in rotation, all answering, sampled every second. Tests change what they are about."""

    def __init__(self) -> None:
        self.detector, self.now = StallDetector(), 100.0
        self.replies = dict.fromkeys("abcde", 0)
        self.stalled = dict.fromkeys("abcde", 0)
        self.answering = set("abcde")
        self.in_rotation = set("abcde")
        self.table_full = False

    def sample(self, seconds: int) -> Mapping[str, int]:
        judged: Mapping[str, int] = {}
        for _ in range(seconds):
            self.now += 1.0
            for id_ in self.answering:
                self.replies[id_] += 1
            seen = {id_: Replies(self.stalled[id_], self.replies[id_], id_ in self.in_rotation) for id_ in self.replies}
            judged = self.detector.judge(seen, self.now, self.table_full)
        return judged

    def freeze(self, *ids: str, stalled: int = 3) -> None:
        self.answering -= set(ids)
        for id_ in ids:
            self.stalled[id_] = stalled


@pytest.fixture
def fleet() -> Fleet:
    made = Fleet()
    made.sample(20)
    return made


def test_a_backend_whose_connections_all_wait_is_frozen_after_ten_seconds_without_a_reply(fleet: Fleet) -> None:
    fleet.freeze("a", stalled=4)
    assert fleet.sample(9) == {}
    assert fleet.sample(1) == {"a": 4}


def test_two_stalled_connections_may_be_long_polls(fleet: Fleet) -> None:
    fleet.freeze("a", stalled=2)
    assert fleet.sample(30) == {}


def test_a_backend_that_answers_others_is_not_frozen_however_many_wait(fleet: Fleet) -> None:
    fleet.stalled["a"] = 500
    assert fleet.sample(30) == {}


def test_a_backend_out_of_rotation_is_not_judged(fleet: Fleet) -> None:
    fleet.freeze("a")
    fleet.in_rotation.discard("a")
    assert fleet.sample(30) == {}


def test_where_half_of_the_others_do_not_answer_either_nobody_is_judged(fleet: Fleet) -> None:
    fleet.answering -= {"b", "c"}
    fleet.freeze("a")
    assert fleet.sample(30) == {}


def test_where_half_of_the_others_have_stalled_connections_nobody_is_judged(fleet: Fleet) -> None:
    """An application whose answers are slow everywhere."""
    fleet.stalled.update(b=3, c=3)
    fleet.freeze("a")
    assert fleet.sample(30) == {}


def test_one_of_the_others_may_be_slow(fleet: Fleet) -> None:
    fleet.stalled.update(b=3, c=2)  # two of c's clients may have been given up, or be long polls
    fleet.freeze("a")
    assert fleet.sample(30) == {"a": 3}


def test_others_out_of_rotation_prove_nothing(fleet: Fleet) -> None:
    fleet.in_rotation = {"a", "b"}
    fleet.answering.discard("b")
    fleet.freeze("a")
    assert fleet.sample(30) == {}


def test_a_backend_alone_is_never_judged(fleet: Fleet) -> None:
    fleet.in_rotation = {"a"}
    fleet.freeze("a")
    assert fleet.sample(30) == {}


def test_others_that_never_answered_are_no_proof_right_after_a_start() -> None:
    fleet = Fleet()
    fleet.answering = set()
    fleet.freeze("a")
    assert fleet.sample(40) == {}


def test_a_new_backend_is_watched_for_ten_seconds_before_it_is_judged(fleet: Fleet) -> None:
    fleet.replies["f"], fleet.stalled["f"] = 0, 5
    fleet.in_rotation.add("f")
    assert fleet.sample(10) == {}
    assert fleet.sample(1) == {"f": 5}


def test_with_a_full_connection_table_nobody_is_judged(fleet: Fleet) -> None:
    fleet.table_full = True
    fleet.freeze("a")
    assert fleet.sample(30) == {}
    fleet.table_full = False
    assert fleet.sample(1) == {"a": 3}


def test_the_verdict_ends_with_the_first_reply(fleet: Fleet) -> None:
    fleet.freeze("a")
    assert fleet.sample(12) == {"a": 3}
    fleet.in_rotation.discard("a")
    fleet.answering.add("a")
    assert fleet.sample(1) == {}


def test_the_verdict_holds_out_of_rotation_and_ends_after_a_minute_with_ten_seconds_to_answer(fleet: Fleet) -> None:
    fleet.freeze("a")
    assert fleet.sample(10) == {"a": 3}
    fleet.in_rotation.discard("a")
    fleet.stalled["a"] = 0
    assert fleet.sample(59) == {"a": 3}
    assert fleet.sample(1) == {}
    fleet.in_rotation.add("a")
    fleet.stalled["a"] = 3
    assert fleet.sample(9) == {}
    assert fleet.sample(1) == {"a": 3}


def test_several_can_be_frozen_at_once(fleet: Fleet) -> None:
    fleet.freeze("a", "b")
    assert fleet.sample(11).keys() == {"a", "b"}


def test_a_backend_that_is_gone_is_forgotten(fleet: Fleet) -> None:
    fleet.freeze("a")
    fleet.sample(11)
    del fleet.replies["a"]
    assert fleet.sample(1) == {}
    fleet.replies["a"] = 0
    assert fleet.sample(9) == {}


def test_the_sentence_has_the_number() -> None:
    assert why(7) == "7 connections wait for a first reply, none got one for 10 s"
