"""The estimator with simulated backends: processor-sharing queues with random arrivals."""

from __future__ import annotations

import heapq
import itertools
import random
import threading
from statistics import mean, median_low

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import weights
from weights import BOUND, HEADROOM, Estimate, Learner, adapt, slow_start

INTERVAL, SERVICE = 2.0, 0.01  # seconds: between reports, and of work in a request at speed 1


class Simulation:
    """`closed`: the number of clients with one request at a time. `rate`: Poisson arrivals per second. `background`:
    requests per second on kept-alive connections of each backend, which do not depend on shares and are not counted."""

    def __init__(
        self,
        speeds: list[float],
        closed: int = 0,
        rate: float = 0,
        background: float = 0,
        adaptive: bool = True,
        seconds: float = 80,
        instant: frozenset[int] = frozenset(),
        service: float = SERVICE,
        seed: int = 1,
    ):
        self.instant, self.service = instant, service  # backends that fail every request immediately
        self.speeds, self.rate, self.background = speeds, rate, background
        self.random = random.Random(seed)
        n = len(speeds)
        self.flows: list[list[tuple[float, int, float, bool]]] = [
            [] for _ in speeds
        ]  # end in work, number, begun, counted
        self.work, self.at = [0.0] * n, [0.0] * n
        self.arrived, self.held = [0] * n, [0.0] * n
        self.shares = [1.0] * n
        self.latencies: list[float] = []
        self.history: list[list[float]] = []
        self.number = 0
        for _ in range(closed):
            self.arrive(0.0)
        estimates: weights.Estimates = {}
        now, due = 0.0, INTERVAL
        arrival = self.next(0.0, rate)
        disturbance = self.next(0.0, background * n)
        while now < seconds:
            end, i = min((self.end(i), i) for i in range(n))
            now = min(end, arrival, disturbance, due)
            if now == due:
                for j in range(n):
                    self.advance(j, now)
                estimates = adapt(
                    estimates,
                    {str(j): self.arrived[j] / INTERVAL for j in range(n)},
                    {str(j): self.held[j] / INTERVAL for j in range(n)},
                    INTERVAL,
                )
                if adaptive:
                    self.shares = [estimates[str(j)].weight for j in range(n)]
                self.history.append([share / sum(self.shares) for share in self.shares])
                self.arrived, self.held, due = [0] * n, [0.0] * n, due + INTERVAL
            elif now == arrival:
                self.arrive(now)
                arrival = self.next(now, rate)
            elif now == disturbance:
                self.put(self.random.randrange(n), now, counted=False)
                disturbance = self.next(now, background * n)
            else:
                self.advance(i, now)
                _, _, begun, counted = heapq.heappop(self.flows[i])
                if counted and now > seconds / 2:
                    self.latencies.append(now - begun)
                if closed and counted:
                    self.arrive(now)
        self.throughput = len(self.latencies) / (seconds / 2)

    def next(self, now: float, rate: float) -> float:
        return now + self.random.expovariate(rate) if rate else float("inf")

    def end(self, i: int) -> float:
        flows = self.flows[i]
        return self.at[i] + (flows[0][0] - self.work[i]) * len(flows) / self.speeds[i] if flows else float("inf")

    def advance(self, i: int, now: float) -> None:
        passed, flows = now - self.at[i], self.flows[i]
        if flows:
            self.work[i] += passed * self.speeds[i] / len(flows)
        self.held[i] += passed * sum(flow[3] for flow in flows)
        self.at[i] = now

    def arrive(self, now: float) -> None:
        i = self.random.choices(range(len(self.speeds)), self.shares)[0]
        self.arrived[i] += 1
        if i not in self.instant:
            self.put(i, now, counted=True)

    def put(self, i: int, now: float, counted: bool) -> None:
        self.advance(i, now)
        self.number += 1
        heapq.heappush(
            self.flows[i], (self.work[i] + self.random.expovariate(1 / self.service), self.number, now, counted)
        )

    def settled(self) -> list[list[float]]:
        return self.history[len(self.history) // 2 :]

    def p99(self) -> float:
        return sorted(self.latencies)[int(0.99 * len(self.latencies))]


def test_slow_backend_gets_a_share_by_its_speed_and_throughput_doubles() -> None:
    equal = Simulation([1, 1, 0.25], closed=16, adaptive=False)
    adaptive = Simulation([1, 1, 0.25], closed=16)
    assert adaptive.throughput > 2.2 * equal.throughput
    assert all(0.08 < shares[2] < 0.16 for shares in adaptive.settled())


def test_throughput_of_a_slow_and_a_fast_backend_doubles() -> None:
    gains = []
    for seed in range(8):
        equal = Simulation([1, 0.25], closed=16, adaptive=False, seed=seed)
        adaptive = Simulation([1, 0.25], closed=16, seed=seed)
        gains.append(adaptive.throughput / equal.throughput)
    assert mean(gains) >= 2


@pytest.mark.parametrize("service", [0.009, 0.0125, 0.02, 0.05], ids=["busy", "full", "overloaded", "far overloaded"])
def test_backend_that_fails_every_request_immediately_gains_little_share(service: float) -> None:
    """At 220 requests a second over three, of which the second and the third work for `service` seconds each."""
    shares = Simulation([1, 1, 1], rate=220, instant=frozenset({0}), service=service).history
    assert max(row[0] for row in shares) <= 1.25 / 3


def test_backend_that_fails_immediately_gains_little_share_from_backends_that_answer_in_50_ms() -> None:
    """Backends that answer in the same time whatever their load: 110 connections a second, 50 ms each."""
    estimates: weights.Estimates = {}
    shares = []
    for _ in range(200):
        weight = {id_: estimates[id_].weight if estimates else 1.0 for id_ in "abc"}
        rates = {id_: 110 * weight[id_] / sum(weight.values()) for id_ in "abc"}
        flows = {"a": 0.0, "b": 0.05 * rates["b"], "c": 0.05 * rates["c"]}
        estimates = adapt(estimates, rates, flows, INTERVAL)
        shares.append(weight["a"] / sum(weight.values()))
    assert max(shares) <= 1.25 / 3


def test_backend_that_becomes_slower_loses_share() -> None:
    before = {"a": Estimate(90, 0.2, 1.6, 9), "b": Estimate(30, 4.0, 0.4, 9)}
    after = before
    for _ in range(100):
        weight = {id_: estimate.weight for id_, estimate in after.items()}
        rates = {id_: 60 * weight[id_] for id_ in "ab"}
        after = adapt(after, rates, {"a": 0.0, "b": 0.03 * rates["b"]}, INTERVAL)
    assert after["a"].weight / after["b"].weight == pytest.approx(1.25, rel=0.25)


def test_open_loop_that_overloads_the_slow_backend_recovers() -> None:
    equal = Simulation([1, 1, 0.25], rate=140, adaptive=False)
    adaptive = Simulation([1, 1, 0.25], rate=140)
    assert equal.p99() > 10
    assert adaptive.p99() < 1


@pytest.mark.parametrize(
    "load",
    [{"closed": 16}, {"rate": 30}, {"rate": 150}, {"rate": 270}, {"closed": 200}, {"rate": 100, "background": 40}],
)
def test_shares_of_equal_backends_stay_equal(load: dict[str, float]) -> None:
    shares = Simulation([1, 1, 1], **load).history  # type: ignore[arg-type]
    assert all(0.28 < share < 0.40 for row in shares for share in row)
    moves = sum(max(abs(a - b) for a, b in zip(x, y, strict=True)) > 0.005 for x, y in itertools.pairwise(shares))
    assert moves <= 4, "a rewrite for a change that does not matter"


def test_requests_on_kept_alive_connections_do_not_distort_shares() -> None:
    shares = Simulation([1, 1, 0.25], rate=100, background=10).settled()
    assert all(0.06 < row[2] < 0.2 for row in shares)


@settings(max_examples=15)
@given(speeds=st.lists(st.floats(0.5, 1.5), min_size=2, max_size=6))
def test_without_noise_shares_converge_to_speeds(speeds: list[float]) -> None:
    """Each interval's exact means of M/M/1 queues at 70 % load: what the model itself predicts, without noise."""
    capacity = [1000 * speed for speed in speeds]
    counted = [min(mu, HEADROOM * median_low(capacity)) for mu in capacity]
    estimates: weights.Estimates = {}
    history = []
    for _ in range(60):
        weight = [estimates[str(i)].weight if estimates else 1.0 for i in range(len(speeds))]
        rates = [0.7 * sum(counted) * w / sum(weight) for w in weight]
        load = [min(rate / mu, 0.98) for rate, mu in zip(rates, capacity, strict=True)]
        flows = {str(i): rho / (1 - rho) for i, rho in enumerate(load)}
        estimates = adapt(estimates, {str(i): rate for i, rate in enumerate(rates)}, flows, INTERVAL)
        history.append([w / sum(weight) for w in weight])
    for share, mu in zip(history[-1], counted, strict=True):
        assert abs(share / (mu / sum(counted)) - 1) < 0.3
    assert max(abs(a - b) for a, b in zip(history[-1], history[-10], strict=True)) < 0.02


@given(
    st.dictionaries(
        st.text(min_size=1, max_size=3),
        st.tuples(st.floats(0, 1e6), st.floats(0, 1e6), st.floats(1 / BOUND, BOUND)),
        max_size=12,
    )
)
def test_weights_are_always_within_bounds(seen: dict[str, tuple[float, float, float]]) -> None:
    before = {id_: Estimate(rate, flows, weight) for id_, (rate, flows, weight) in seen.items()}
    rates = {id_: values[0] for id_, values in seen.items()}
    after = adapt(before, rates, {id_: values[1] for id_, values in seen.items()}, INTERVAL)
    assert after.keys() == seen.keys()
    assert all(1 / BOUND <= estimate.weight <= BOUND for estimate in after.values())


def test_idle_fleet_keeps_its_weights() -> None:
    before = {"a": Estimate(10, 0.1, 1.5), "b": Estimate(30, 0.3, 0.5)}
    after = adapt(before, {"a": 1, "b": 50}, {"a": 0.0, "b": 0.4}, INTERVAL)
    assert {id_: estimate.weight for id_, estimate in after.items()} == {"a": 1.5, "b": 0.5}


def test_slow_start_reaches_the_full_share_in_four_steps() -> None:
    assert [slow_start(age) for age in (0, 0.9, 1, 2, 3, 100)] == [0.25, 0.25, 0.5, 0.75, 1.0, 1.0]


def test_learner_averages_samples_and_takes_differences_of_counters() -> None:
    learner = Learner()
    learner.learn({"a": 100}, 0.0, {"a"})
    for waiting in (1, 3):
        learner.sample({"a": waiting})
    learner.learn({"a": 140}, 2.0, {"a"})
    assert learner._estimates["a"] == Estimate(20.0, 2.0)


def test_new_backend_has_no_estimate_before_its_first_whole_interval() -> None:
    """It would begin with a rate that is too low: of a part of the interval, or of none of its connections."""
    learner = Learner()
    learner.learn({"a": 0}, 0.0, {"a", "b"})
    learner.sample({"a": 1, "b": 1})
    learner.learn({"a": 20, "b": 5000}, 2.0, {"a", "b"})
    assert learner._estimates.keys() == {"a"}
    learner.sample({"a": 1, "b": 1})
    learner.learn({"a": 40, "b": 5020}, 4.0, {"a", "b"})
    assert learner._estimates["b"] == Estimate(10.0, 1.0)


def test_backend_that_is_out_of_rotation_for_a_while_keeps_its_weight() -> None:
    learner = Learner({"a": Estimate(90, 1, 1.6), "b": Estimate(22, 1, 0.4)})
    learner.learn({"a": 0, "b": 0}, 0.0, {"a", "b"})
    for now in (2.0, 4.0):
        learner.sample({"a": 1})
        learner.learn({"a": round(90 * now)}, now, {"a", "b"})
    assert learner._estimates["b"] == Estimate(22, 1, 0.4)
    learner.sample({"a": 1})
    learner.learn({"a": 400}, 6.0, {"a"})
    assert learner._estimates.keys() == {"a"}, "b was removed"


def test_only_new_backends_start_slowly() -> None:
    learner = Learner()
    learner.ready({"old"}, 0.0)
    learner.ready({"old", "new"}, 10.0)
    assert learner.weight("old", 10.0, adaptive=True) == 1.0
    assert learner.weight("new", 10.0, adaptive=True) == 0.25
    assert learner.ramping(10.0)
    assert not learner.ramping(14.0)


def test_threads_share_a_learner_without_losing_samples() -> None:
    learner = Learner()
    learner.learn({"a": 0}, 0.0, {"a"})

    def sample() -> None:
        for _ in range(2000):
            learner.sample({"a": 1})
            learner.ready({"a", "b"}, 0.0)

    threads = [threading.Thread(target=sample) for _ in range(4)]
    for thread in threads:
        thread.start()
    for number in range(200):
        learner.weight(str(number), 1.0, adaptive=True)
        learner.ramping(1.0)
    for thread in threads:
        thread.join()
    learner.learn({"a": 10}, 2.0, {"a"})
    assert learner._estimates["a"] == Estimate(5.0, 1.0)
