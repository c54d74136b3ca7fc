"""What Prometheus is told by manager and balancer: right names, right numbers, and counters that only grow."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import REGISTRY
from prometheus_client.parser import text_string_to_metric_families

from core.engine import EngineError
from core.fleet import Backend
from core.load import Sample
from core.scaler import Decision, Load, Memory, Policy, decide
from exposition import exposition
from fakes import TOKEN, Clock, FakeEngine, controller, eventually, report, sample
from fakes_netfilter import FakeNetfilter
from manager_client import ManagerClient
from snapshot import Backend as Seen
from snapshot import Snapshot
from synchronization_client import Balancer
from web import metrics
from web.app import create_app

Told = dict[tuple[str, ...], float]


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

    def told(self) -> Told:
        """Name and labels' values (in the order of the labels' names) → number."""
        families = text_string_to_metric_families(self.text())
        return {(s.name.removeprefix("lbscaler_"), *s.labels.values()): s.value for f in families for s in f.samples}

    def hear(self, balancer: str = "b1", **backends: Sample) -> Decision | None:
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
    made = Balancer(FakeNetfilter(), ManagerClient("127.0.0.1:1", TOKEN, "b1"), "b1")
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
        scraped.hear(_2=sample(packets, share=0.5), _3=sample(packets, share=0.5))
    scraped.step_until(lambda: value(scraped.controller.recorder._failures))
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
def test_promtool_finds_nothing_to_mend(tmp_path: Path, text: Callable[[Path], str]) -> None:
    told = text(tmp_path)
    done = subprocess.run(["promtool", "check", "metrics"], input=told, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout + done.stderr) == (0, "")


# -- the manager ------------------------------------------------------------------------------------------------------


def test_the_fleet_and_the_load_are_told(scraped: Scraped) -> None:
    scraped.hear(_2=sample(0), _3=sample(0))
    assert not any(key[0] == "load" for key in scraped.told()), "unknown is no zero"
    scraped.hear(_2=sample(180, share=0.25, active=7), _3=sample(120, healthy=False, share=0.75))
    scraped.clock.pass_by(1.5)
    told = scraped.told()
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
    assert {key: told.get(key) for key in expected} == expected


def test_a_pause_and_an_engine_that_is_away_are_told(scraped: Scraped) -> None:
    scraped.controller.pause(True)
    scraped.engine.down = "no such socket"
    scraped.controller.step()
    told = scraped.told()
    assert (told["paused",], told["engine_reachable",]) == (1, 0)


def test_counters_neither_move_by_being_read_nor_fall_when_balancers_go_and_start_anew(scraped: Scraped) -> None:
    def packets() -> float:
        assert scraped.told() == scraped.told()
        return scraped.told()["backend_packets_total", "p-backend-1"]

    assert packets() == 0, "there from the start"
    for name, count, total in (
        ("b1", 100, 100),
        ("b2", 1000, 1100),
        ("b1", 130, 1130),
        ("b1", 20, 1150),  # b1 has started anew
    ):
        scraped.hear(name, _2=sample(count))
        assert packets() == total
    scraped.engine.balancers = frozenset({"b1"})  # b2 is gone for good
    scraped.hear("b1", _2=sample(20))
    scraped.controller.step()
    assert (scraped.told()["balancers",], packets()) == (1, 1150)
    kept = [set(samples) for samples in scraped.controller.recorder._heard.values()]
    assert kept == [{"b1"}], "what a balancer that is gone had counted is forgotten"


def test_a_backends_counters_go_with_it_and_its_names_next_bearer_begins_at_zero(scraped: Scraped) -> None:
    scraped.hear(_2=sample(100))
    scraped.clock.pass_by(30)
    scraped.engine.die("p-backend-1", 1)
    scraped.step_until(
        lambda: {b["name"] for b in scraped.controller.status()["backends"]} == {"p-backend-2", "p-backend-3"}
    )
    assert ("backend_packets_total", "p-backend-1") not in scraped.told()
    scraped.controller.scale(3, None, None)
    scraped.step_until(lambda: any(b["ip"] == "198.18.0.4" for b in scraped.controller.status()["backends"]))
    assert scraped.told()["backend_packets_total", "p-backend-1"] == 0
    scraped.hear(_4=sample(130))  # p-backend-3 has the address that was free first
    assert scraped.told()["backend_packets_total", "p-backend-1"] == 130


def test_what_was_counted_for_an_addresss_last_owner_is_not_the_next_ones(scraped: Scraped) -> None:
    scraped.hear(_2=sample(100, id="another"), _3=sample(50))
    told = scraped.told()
    assert (told["backend_packets_total", "p-backend-1"], told["backend_packets_total", "p-backend-2"]) == (0, 50)


def test_a_launch_is_timed_until_a_balancer_finds_it_ready(tmp_path: Path) -> None:
    scraped = Scraped(tmp_path, running=0, spares=1)
    scraped.step_until(lambda: sum(bool(b["ip"]) for b in scraped.controller.status()["backends"]) == 3)
    scraped.clock.pass_by(2)
    for _ in range(2):  # well for two reports, timed once
        scraped.hear(_2=sample(), _3=sample(healthy=None))
        told = scraped.told()
        assert (told["launch_seconds_count",], told["launch_seconds_sum",]) == (1, 4)
    for _ in range(2):
        scraped.hear(_2=sample(), _3=sample(), _4=sample())
        told = scraped.told()
        assert (told["launch_seconds_count",], told["launch_seconds_sum",]) == (3, 4 + 8 + 8), "a spare too"
    assert told["launch_seconds_bucket", "5.0"] == 1


def test_backends_that_were_there_before_were_not_launched(scraped: Scraped) -> None:
    scraped.hear(_2=sample(), _3=sample())
    assert scraped.told()["launch_seconds_count",] == 0


def test_launches_that_come_to_nothing_are_counted_whatever_ended_them(tmp_path: Path) -> None:
    scraped = Scraped(tmp_path, running=0, min=1)
    scraped.engine.refusals = [EngineError("no room")]
    scraped.step_until(lambda: scraped.told()["launch_failures_total",] == 1)
    assert scraped.told()["launch_backoff_seconds",] > 0
    scraped.engine.crashing = {"image-1": 1}
    scraped.clock.pass_by(60)
    scraped.step_until(lambda: scraped.told()["launch_failures_total",] == 2)


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
        (Memory(0.0, panic_since=990.0), Load(300), 5, "panic"),
        (MANY, Load(300), 5, "stable_window"),
    ],
)
def test_decisions_are_counted_by_the_kind_of_limit_with_the_last_word(
    memory: Memory, load: Load, capacity: int, kind: str
) -> None:
    decision, _ = decide(Policy(2, 10, 100.0), memory, load, capacity, 1000.0)
    tally = metrics.Tally()
    for _ in range(2):
        tally.decided(decision)
    (counted,) = [s for family in tally.collect() for s in family.samples if s.name == "lbscaler_decisions_total"]
    assert (counted.labels, counted.value) == ({"verdict": decision.verdict, "reason": kind}, 2)


@pytest.mark.parametrize(
    ("changelog", "version"),
    [
        ("# Changelog\n\n## 1.2.0 (2025-01-01)\n\n## 1.1.0\n", "1.2.0"),
        ("# Changelog\n\n## Unreleased\n", "unreleased"),
        (None, "unknown"),
    ],
)
def test_the_version_is_the_changelogs_newest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changelog: str | None, version: str
) -> None:
    monkeypatch.setattr(metrics, "ROOT", tmp_path)
    if changelog is not None:
        (tmp_path / "CHANGELOG.md").write_text(changelog)
    assert Scraped(tmp_path).told()["build_info", version] == 1


def test_a_label_has_no_value_that_a_reporter_chose_but_its_own_name() -> None:
    tally = metrics.Tally()
    fleet = {"p-backend-1": Backend("p-backend-1", "active", 0.0, ip="198.18.0.2")}
    tally.reported(report("b1", _2=sample(1), _9=sample(1)), fleet)
    assert {v for f in tally.collect() for s in f.samples for v in s.labels.values() if "." not in v} == {
        "p-backend-1",
        "+Inf",
    }


def test_nothing_is_told_to_the_librarys_own_registry() -> None:
    """It would outlive the controller that counts, and mix those of two."""
    assert not [family.name for family in REGISTRY.collect() if family.name.startswith("lbscaler")]
