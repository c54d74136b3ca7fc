"""The metrics of manager and balancer for Prometheus: names, numbers, and counters that only grow."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import REGISTRY
from prometheus_client.parser import text_string_to_metric_families

from core.engine import EngineError
from core.fleet import ACTIVE, SPARE, Backend
from core.load import Sample
from core.scaler import Decision, Load, Memory, Policy, decide
from core.settings import VERSION
from core.snapshot import ProblemKind
from core.state_files import SavedFleet, StateFiles
from exposition import exposition
from fakes import TOKEN, Clock, FakeEngine, controller, eventually, report, sample
from fakes_netfilter import FakeNetfilter
from manager_client import ManagerClient
from snapshot import Backend as Seen
from snapshot import Snapshot
from synchronization_client import Balancer
from web import metrics
from web.app import create_app

Samples = dict[tuple[str, ...], float]


class Scraped:
    """A manager with `running` backends, as Prometheus sees it."""

    def __init__(self, place: Path, running: int = 2, **changes: object) -> None:
        self.clock = Clock()
        self.engine = FakeEngine(*(f"p-backend-{n}" for n in range(1, running + 1)))
        self.controller = controller(self.engine, place, self.clock, **changes)
        self.controller.adopt(None)
        self.app = create_app(self.controller, TOKEN, [])

    def text(self) -> str:
        return self.app.test_client().get("/metrics").text

    def samples(self) -> Samples:
        """Name and labels' values (in the order of the labels' names) → number."""
        families = text_string_to_metric_families(self.text())
        return {(s.name.removeprefix("lbscaler_"), *s.labels.values()): s.value for f in families for s in f.samples}

    def report(self, balancer: str = "b1", **backends: Sample) -> Decision | None:
        """A report, two seconds after the one before."""
        self.clock.pass_by(2)
        return self.controller.report(report(balancer, **backends))

    def step_until(self, condition: Callable[[], object]) -> None:
        assert eventually(lambda: (self.controller.step(), condition())[1]), self.controller.status()


@pytest.fixture
def scraped(tmp_path: Path) -> Scraped:
    return Scraped(tmp_path)


def balancer() -> Balancer:
    """With two backends, over a kernel in memory."""
    made = Balancer(FakeNetfilter(), ManagerClient("127.0.0.1:1", lambda: TOKEN), "b1")
    made.state.prober._loop.close()  # no backend is probed
    made.state.snapshot = Snapshot("r1", (Seen("a", "198.18.0.2", "active"), Seen("b", "198.18.0.3", "active")))
    return made


def value(metric: Any, suffix: str = "_total") -> float:
    return sum(s.value for family in metric.collect() for s in family.samples if s.name.endswith(suffix))


def managers_text(place: Path) -> str:
    scraped = Scraped(place, min=3)
    scraped.engine.refusals = [EngineError("no room")]
    scraped.controller.step()
    for packets in (0, 900):
        scraped.report(_2=sample(packets, share=0.5), _3=sample(packets, share=0.5))
    scraped.step_until(lambda: scraped.controller.recorder.counts()["launch_failures"])
    text = scraped.text()
    assert "lbscaler_decisions_total{" in text
    assert 'lbscaler_balancer_last_seen_seconds{balancer="b1"}' in text
    return text


def balancers_text(place: Path) -> str:
    made = balancer()
    made.reconciler.reconcile()
    return exposition(made.state).decode()


@pytest.mark.skipif(not shutil.which("promtool"), reason="needs promtool, of Debian's package prometheus")
@pytest.mark.parametrize("text", [managers_text, balancers_text])
def test_promtool_accepts_the_metrics(tmp_path: Path, text: Callable[[Path], str]) -> None:
    exposed = text(tmp_path)
    done = subprocess.run(["promtool", "check", "metrics"], input=exposed, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout + done.stderr) == (0, "")


# -- the manager ------------------------------------------------------------------------------------------------------


def test_the_fleet_and_the_load_are_gauges(scraped: Scraped) -> None:
    scraped.report(_2=sample(0), _3=sample(0))
    assert not any(key[0] == "load" for key in scraped.samples()), "unknown is no zero"
    scraped.report(_2=sample(180, share=0.25, active=7), _3=sample(120, healthy=False, share=0.75))
    scraped.clock.pass_by(1.5)
    samples = scraped.samples()
    expected = {
        **{("load", "packets"): 150, ("target",): 100, ("desired_backends",): 2},
        **{("min_backends",): 2, ("max_backends",): 10, ("ready_backends",): 1},
        **{("backends", "active"): 2, ("backends", "spare"): 0},
        **{("backend_share", "p-backend-1"): 0.25, ("backend_share", "p-backend-2"): 0.75},
        **{("backend_active", "p-backend-1"): 7, ("backend_packets_total", "p-backend-2"): 120},
        **{("backend_bytes_total", "p-backend-1"): 18000, ("decisions_total", "load", "OK"): 1},
        **{("balancers",): 1, ("balancer_last_seen_seconds", "b1"): 1.5},
        **{("paused",): 0, ("engine_reachable",): 1, ("update_given_up",): 0, ("launch_backoff_seconds",): 0},
    }
    assert {key: samples.get(key) for key in expected} == expected


def test_a_pause_and_an_unreachable_engine_are_gauges(scraped: Scraped) -> None:
    scraped.controller.pause(True)
    scraped.engine.down = "no such socket"
    scraped.controller.step()
    samples = scraped.samples()
    assert (samples["paused",], samples["engine_reachable",]) == (1, 0)


def test_each_problem_of_the_project_is_a_gauge_of_its_kind(scraped: Scraped) -> None:
    scraped.report(_2=sample(0), _3=sample(0))
    samples = scraped.samples()
    kinds = {key[1]: number for key, number in samples.items() if key[0] == "problems"}
    assert kinds == dict.fromkeys(ProblemKind, 0)
    scraped.engine.down = "no such socket"
    scraped.controller.step()
    problems = {key[1] for key, number in scraped.samples().items() if key[0] == "problems" and number}
    assert problems == {"engine_unreachable"}


def test_decisions_of_each_kind_begin_at_zero_so_that_the_first_one_is_an_increase(scraped: Scraped) -> None:
    kinds = {key[1:]: number for key, number in scraped.samples().items() if key[0] == "decisions_total"}
    assert (kinds["load", "CREATE_SERVER"], kinds["stable_window", "STOP_SERVER"], sum(kinds.values())) == (0, 0, 0)


def test_counters_only_grow_when_balancers_restart_or_are_removed(scraped: Scraped) -> None:
    def packets() -> float:
        assert scraped.samples() == scraped.samples()
        return scraped.samples()["backend_packets_total", "p-backend-1"]

    assert packets() == 0, "there from the start"
    for name, count, total in (
        ("b1", 100, 0),  # of the time before this manager
        ("b2", 1000, 0),
        ("b1", 130, 30),
        ("b1", 20, 50),  # b1 has restarted
    ):
        scraped.report(name, _2=sample(count))
        assert packets() == total
    scraped.engine.balancers = frozenset({"b1"})  # b2 has been removed
    scraped.report("b1", _2=sample(20))
    scraped.controller.step()
    assert (scraped.samples()["balancers",], packets()) == (1, 50)


def test_a_backends_counters_end_with_it_and_a_new_one_of_the_same_name_starts_at_zero(scraped: Scraped) -> None:
    scraped.report(_2=sample(100))
    scraped.clock.pass_by(30)
    scraped.engine.die("p-backend-1", 1)
    scraped.step_until(
        lambda: {b["name"] for b in scraped.controller.status()["backends"]} == {"p-backend-2", "p-backend-3"}
    )
    assert ("backend_packets_total", "p-backend-1") not in scraped.samples()
    scraped.controller.scale(3, None, None)
    scraped.step_until(lambda: any(b["ip"] == "198.18.0.4" for b in scraped.controller.status()["backends"]))
    assert scraped.samples()["backend_packets_total", "p-backend-1"] == 0
    scraped.report(_4=sample(130))  # p-backend-3 has the address that was free first
    assert scraped.samples()["backend_packets_total", "p-backend-1"] == 130


def test_a_renamed_backend_starts_at_zero_and_counts_only_what_follows(scraped: Scraped) -> None:
    for packets in (1000, 1100):
        scraped.report(_2=sample(packets), _3=sample(packets))
    container = scraped.engine.containers.pop("p-backend-1")
    scraped.engine.containers["renamed"] = replace(container, name="renamed")
    scraped.controller.step()
    scraped.report(_2=sample(1150), _3=sample(1150))
    counted = {key[1]: count for key, count in scraped.samples().items() if key[0] == "backend_packets_total"}
    assert counted == {"renamed": 50, "p-backend-2": 150}


def test_traffic_of_a_backend_that_the_engine_has_launched_itself_is_counted_from_its_start(scraped: Scraped) -> None:
    scraped.report(_2=sample(1000), _3=sample(1000))
    scraped.engine.run("p-backend-3")  # as a Swarm does
    scraped.controller.step()
    scraped.report(_2=sample(1000), _3=sample(1000), _4=sample(70))
    assert scraped.samples()["backend_packets_total", "p-backend-3"] == 70


def test_counters_of_an_earlier_backend_with_the_same_address_are_no_base_of_a_new_ones(scraped: Scraped) -> None:
    known = next(iter(scraped.engine.containers.values())).id[:12]
    scraped.report(_2=sample(10, id="another"), _3=sample(0))
    scraped.report(_2=sample(50, id=known), _3=sample(0))
    assert scraped.samples()["backend_packets_total", "p-backend-1"] == 50


def test_a_sample_of_an_earlier_backend_with_the_same_address_is_not_counted(scraped: Scraped) -> None:
    for packets in (100, 150):
        scraped.report(_2=sample(packets, id="another"), _3=sample(packets))
    samples = scraped.samples()
    assert (samples["backend_packets_total", "p-backend-1"], samples["backend_packets_total", "p-backend-2"]) == (0, 50)


def test_a_launch_is_timed_until_a_balancer_reports_it_healthy(tmp_path: Path) -> None:
    scraped = Scraped(tmp_path, running=0, spares=1)
    scraped.step_until(lambda: sum(bool(b["ip"]) for b in scraped.controller.status()["backends"]) == 3)
    scraped.clock.pass_by(2)
    for _ in range(2):  # healthy in two reports, timed once
        scraped.report(_2=sample(), _3=sample(healthy=None))
        samples = scraped.samples()
        assert (samples["launch_seconds_count",], samples["launch_seconds_sum",]) == (1, 4)
    for _ in range(2):
        scraped.report(_2=sample(), _3=sample(), _4=sample())
        samples = scraped.samples()
        assert (samples["launch_seconds_count",], samples["launch_seconds_sum",]) == (3, 4 + 8 + 8), "a spare too"
    assert samples["launch_seconds_bucket", "5.0"] == 1


def test_a_spare_that_is_ready_again_is_not_timed_again(tmp_path: Path) -> None:
    scraped = Scraped(tmp_path, running=0, spares=1)
    scraped.step_until(lambda: sum(bool(b["ip"]) for b in scraped.controller.status()["backends"]) == 3)
    for spare_is_healthy in (True, False, True):
        scraped.report(_2=sample(), _3=sample(), _4=sample(healthy=spare_is_healthy))
        scraped.controller.step()
    assert scraped.samples()["launch_seconds_count",] == 3


def test_adopted_backends_are_not_timed_as_launches(tmp_path: Path) -> None:
    ids = [container.id for container in FakeEngine("a", "b", "c").containers.values()]
    states = dict(zip(ids, (ACTIVE, ACTIVE, SPARE), strict=True))
    StateFiles(tmp_path / "ip.txt").write_fleet(SavedFleet(2, states))
    (tmp_path / "ip.txt").touch()
    scraped = Scraped(tmp_path, running=3, spares=1)
    scraped.report(_2=sample(), _3=sample(), _4=sample())
    scraped.controller.step()
    samples = scraped.samples()
    assert (samples["backends", "spare"], samples["launch_seconds_count",]) == (1, 0)


def test_each_kind_of_failed_launch_is_counted(tmp_path: Path) -> None:
    scraped = Scraped(tmp_path, running=0, min=1)
    scraped.engine.refusals = [EngineError("no room")]
    scraped.step_until(lambda: scraped.samples()["launch_failures_total",] == 1)
    assert scraped.samples()["launch_backoff_seconds",] > 0
    scraped.engine.crashing = {"image-1": 1}
    scraped.clock.pass_by(60)
    scraped.step_until(lambda: scraped.samples()["launch_failures_total",] == 2)


MANY = Memory(0.0, recommended=((999.0, 5),))


@pytest.mark.parametrize(
    ("memory", "load", "capacity", "kind"),
    [
        (MANY, Load(400), 4, "load"),
        (MANY, Load(1000), 2, "step_limit"),
        (MANY, Load(1200), 9, "max"),
        (Memory(0.0), Load(0), 3, "min"),
        (MANY, Load(0, "b2"), 5, "load_unknown"),
        (Memory(990.0), Load(0), 5, "no_history"),
        (Memory(0.0, overloaded_at=990.0), Load(300), 5, "panic"),
        (MANY, Load(300), 5, "stable_window"),
    ],
)
def test_decisions_are_counted_by_the_limit_that_was_applied_last(
    memory: Memory, load: Load, capacity: int, kind: str
) -> None:
    decision, _ = decide(Policy(2, 10, 100.0), memory, load, capacity, 1000.0)
    tally = metrics.Tally()
    for _ in range(2):
        tally.decided(decision)
    assert {key: count for key, count in tally.counts()["decisions"].items() if count} == {(decision.verdict, kind): 2}


def test_the_version_is_that_of_the_settings(scraped: Scraped) -> None:
    assert scraped.samples()["build_info", VERSION] == 1


def test_a_report_cannot_add_a_label_value() -> None:
    tally = metrics.Tally()
    backend = Backend("p-backend-1", "active", 0.0, ip="198.18.0.2")
    tally.changed(None, backend, 0.0)
    tally.reported(report("b1", _2=sample(1), _9=sample(1)), report("b1"), {"p-backend-1": backend})
    assert tally.counts()["traffic"].keys() == {"p-backend-1"}


def test_the_librarys_global_registry_is_not_used() -> None:
    """It would outlive the controller that counts, and mix those of two."""
    assert not [family.name for family in REGISTRY.collect() if family.name.startswith("lbscaler")]
