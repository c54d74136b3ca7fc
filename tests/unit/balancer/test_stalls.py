"""The conditions under which a backend counts as frozen, one at a time."""

from __future__ import annotations

import math
import random
from collections.abc import Mapping

import pytest

import stalls
from health import Cause, Health
from stalls import Replies, StallDetector


class Fleet:
    """Backends a to e are in rotation, all give two first replies a second, and are sampled every second."""

    def __init__(self) -> None:
        self.detector, self.now = StallDetector(), 100.0
        self.replies = dict.fromkeys("abcde", 0)
        self.stalled = dict.fromkeys("abcde", 0)
        self.answering = set("abcde")
        self.in_rotation = set("abcde")
        self.weights: dict[str, float] = {}
        self.table_full = False

    def sample(self, seconds: int) -> Mapping[str, int]:
        frozen: Mapping[str, int] = {}
        for _ in range(seconds):
            self.now += 1.0
            for id_ in self.answering:
                self.replies[id_] += 2
            weights = {id_: self.weights.get(id_, 1.0) if id_ in self.in_rotation else 0.0 for id_ in self.replies}
            seen = {id_: Replies(self.stalled[id_], self.replies[id_], weights[id_]) for id_ in self.replies}
            frozen = self.detector.frozen(seen, self.now, self.table_full)
        return frozen

    def freeze(self, *ids: str, stalled: int = 3) -> None:
        self.answering -= set(ids)
        for id_ in ids:
            self.stalled[id_] = stalled


@pytest.fixture
def fleet() -> Fleet:
    made = Fleet()
    made.sample(20)
    return made


def test_backend_without_a_reply_for_ten_seconds_is_frozen(fleet: Fleet) -> None:
    fleet.freeze("a", stalled=4)
    assert fleet.sample(9) == {}
    assert fleet.sample(1) == {"a": 4}


def test_two_stalled_connections_are_not_enough(fleet: Fleet) -> None:
    fleet.freeze("a", stalled=2)
    assert fleet.sample(30) == {}


def test_backend_that_answers_some_clients_is_not_frozen(fleet: Fleet) -> None:
    fleet.stalled["a"] = 500
    assert fleet.sample(30) == {}


def test_backend_that_is_not_in_rotation_is_not_frozen(fleet: Fleet) -> None:
    fleet.freeze("a")
    fleet.in_rotation.discard("a")
    assert fleet.sample(30) == {}


def test_no_backend_is_frozen_if_half_of_the_others_do_not_answer(fleet: Fleet) -> None:
    fleet.answering -= {"b", "c"}
    fleet.freeze("a")
    assert fleet.sample(30) == {}


def test_no_backend_is_frozen_if_half_of_the_others_have_stalled_connections(fleet: Fleet) -> None:
    """All instances of the application answer slowly."""
    fleet.stalled.update(b=3, c=3)
    fleet.freeze("a")
    assert fleet.sample(30) == {}


def test_one_slow_backend_among_the_others_does_not_hide_a_frozen_one(fleet: Fleet) -> None:
    fleet.stalled.update(b=3, c=2)  # c's two may be long polls
    fleet.freeze("a")
    assert fleet.sample(30) == {"a": 3}


def test_answers_of_backends_that_are_not_in_rotation_do_not_count(fleet: Fleet) -> None:
    fleet.in_rotation = {"a", "b"}
    fleet.answering.discard("b")
    fleet.freeze("a")
    assert fleet.sample(30) == {}


def test_single_backend_is_never_frozen(fleet: Fleet) -> None:
    fleet.in_rotation = {"a"}
    fleet.freeze("a")
    assert fleet.sample(30) == {}


def test_no_backend_is_frozen_if_none_ever_answered() -> None:
    fleet = Fleet()
    fleet.answering = set()
    fleet.freeze("a")
    assert fleet.sample(40) == {}


def test_new_backend_can_be_frozen_after_ten_seconds(fleet: Fleet) -> None:
    fleet.replies["f"], fleet.stalled["f"] = 0, 5
    fleet.in_rotation.add("f")
    assert fleet.sample(10) == {}
    assert fleet.sample(1) == {"f": 5}


def test_no_backend_is_frozen_while_the_connection_table_is_full(fleet: Fleet) -> None:
    fleet.table_full = True
    fleet.freeze("a")
    assert fleet.sample(30) == {}
    fleet.table_full = False
    assert fleet.sample(1) == {"a": 3}


def test_frozen_backend_is_released_by_its_first_reply(fleet: Fleet) -> None:
    fleet.freeze("a")
    assert fleet.sample(12) == {"a": 3}
    fleet.in_rotation.discard("a")
    fleet.answering.add("a")
    assert fleet.sample(1) == {}


def test_frozen_backend_is_tried_again_after_a_minute_for_ten_seconds(fleet: Fleet) -> None:
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


def test_several_backends_can_be_frozen(fleet: Fleet) -> None:
    fleet.freeze("a", "b")
    assert fleet.sample(11).keys() == {"a", "b"}


def test_backend_with_a_tenth_of_the_others_share_is_found_later(fleet: Fleet) -> None:
    """Without a reply for ten seconds, it may be healthy: it gets few connections."""
    fleet.weights["a"] = 0.1
    fleet.freeze("a")
    assert fleet.sample(30) == {}
    assert fleet.sample(30) == {"a": 3}


class LongPolls:
    """Backends 0 to n-1, each with three clients in long polls of a minute, and `rate` quick requests a second in all.
    Backend 0 gives no reply at all after the time `frozen_at`."""

    def __init__(self, n: int, rate: float, frozen_at: float = math.inf) -> None:
        chance, detector = random.Random(1), StallDetector()
        replies, quick = [0] * n, chance.expovariate(rate)
        polls = [(chance.uniform(-60, 0), chance.randrange(n)) for _ in range(3 * n)]  # begin, backend
        self.ejections: list[tuple[float, str]] = []  # time, id
        frozen: Mapping[str, int] = {}
        for sample in range(7200):
            now = sample / 2
            rotation = [i for i in range(n) if str(i) not in frozen]
            for number, (begun, i) in enumerate(polls):
                if now - begun >= 60 and not (i == 0 and now >= frozen_at):
                    replies[i] += 1
                    polls[number] = now, chance.choice(rotation)
            while quick <= now:
                i = chance.choice(rotation)
                quick += chance.expovariate(rate)
                replies[i] += not (i == 0 and now >= frozen_at)
            stalled = [sum(i == j and now - begun >= 10 for begun, j in polls) for i in range(n)]
            seen = {str(i): Replies(stalled[i], replies[i], float(i in rotation)) for i in range(n)}
            before, frozen = frozen, detector.frozen(seen, now)
            self.ejections += [(now, id_) for id_ in frozen.keys() - before.keys()]


@pytest.mark.parametrize(("n", "rate"), [(3, 0.5), (3, 1), (3, 3), (10, 2), (10, 8)])
def test_healthy_backends_whose_clients_wait_in_long_polls_are_not_ejected(n: int, rate: float) -> None:
    assert LongPolls(n, rate).ejections == []


@pytest.mark.parametrize("n", [3, 10])
def test_backend_that_freezes_at_two_connections_per_second_is_found_after_ten_seconds(n: int) -> None:
    (at, id_), *_ = LongPolls(n, 2 * n, frozen_at=1000).ejections
    assert id_ == "0"
    assert 1009 <= at <= 1014


def test_removed_backend_is_not_remembered(fleet: Fleet) -> None:
    fleet.freeze("a")
    fleet.sample(11)
    del fleet.replies["a"]
    assert fleet.sample(1) == {}
    fleet.replies["a"] = 0
    assert fleet.sample(9) == {}


def test_health_of_a_frozen_backend_has_its_cause_and_the_number_of_connections() -> None:
    why = "7 connections wait for a first reply, none got one for 10 s"
    assert stalls.health(7) == Health(False, 0, why, Cause.NO_FIRST_REPLY)
