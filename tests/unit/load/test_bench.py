"""The benchmark's pure parts: rules of the alternatives, parsing, ratios, and the page made from stored results."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from bench import report, rules
from bench.load import parse_wrk, quantile, seconds_taken
from bench.results import Results
from bench.ways import BRIDGE_PATH, HAPROXY_HOST, HOST_PATH, PUBLISHED

STORED = report.PICTURES / "results.json"
WRK = """Running 2s test @ http://198.19.252.1:8000/
  2 threads and 48 connections
  10000 requests in 2.00s, 1.5MB read
  Socket errors: connect 1, read 7, write 0, timeout 2
  Non-2xx or 3xx responses: 100
Requests/sec:   5000.00
"""


def test_wrk_counts_only_good_answers_and_all_that_failed() -> None:
    answered = parse_wrk(WRK)
    assert answered.rate == pytest.approx(4950)
    assert answered.failed == 103, "a read error is the end of a connection that was to be closed"


def test_latency_is_of_good_answers_only() -> None:
    head = "response-time,DNS+dialup,DNS,Request-write,Response-delay,Response-read,status-code,offset\n"
    row = "{},0,0,0,0,0,{},0\n"
    outputs = [head + row.format(0.2, 200), head + row.format(0.1, 200) + row.format(9.0, 503)]
    assert sorted(seconds_taken(outputs)) == [0.1, 0.2]
    assert quantile(list(range(100)), 0.99) == 99
    assert quantile([1.0], 0.99) == 1.0


def test_course_rules_are_one_list_with_equal_shares() -> None:
    chances = [float(chance) for chance in re.findall(r"--probability (\S+)", rules.course(["a", "b", "c", "d"]))]
    assert chances == [0.25, pytest.approx(1 / 3), 0.5, 1.0]


def test_kube_proxy_rules_have_its_layout_and_are_removed_completely() -> None:
    text = rules.kube_proxy(31000, ["198.18.0.2", "198.18.0.3"])
    assert "-A BENCH-KUBE-SVC -m statistic --mode random --probability 0.5000000000 -j BENCH-KUBE-SEP-0" in text
    assert "-A BENCH-KUBE-SVC -j BENCH-KUBE-SEP-1" in text
    removal = rules.removal(text)
    inserted = re.findall(r"-I (\w+) 1 (.*)", text)
    assert re.findall(r"-D (\w+) (.*)", removal) == inserted
    created = re.findall(r"^:(\S+)", text, re.MULTILINE)
    assert re.findall(r"^-X (\S+)", removal, re.MULTILINE) == created
    assert removal.count("COMMIT") == 2


def some_results() -> Results:
    results = Results({"processors": 2})
    for way, rate in ((PUBLISHED, 100.0), (HOST_PATH, 98.0), (BRIDGE_PATH, 80.0), (HAPROXY_HOST, 50.0)):
        for quantity in ("new connections", "keep-alive"):
            for count in (1, 3):
                for factor in (1, 2, 3):
                    results.add(quantity, way, count, rate * factor)
    results.add("download", HOST_PATH, 3, 500)
    results.add("download", HAPROXY_HOST, 3, 1000)
    return results


def test_ratio_is_that_of_each_round(tmp_path: Path) -> None:
    some_results().write(tmp_path / "result.json")
    results = Results.read(tmp_path / "result.json")
    ratio = results.ratio("keep-alive", (HOST_PATH, 1), (PUBLISHED, 1))
    assert ratio is not None
    assert (ratio.low, ratio.median, ratio.high) == (0.98, 0.98, 0.98)
    assert results.ratio("keep-alive", (HOST_PATH, 1), ("not measured", 1)) is None


def test_targets_that_are_missed_and_comparisons_that_are_lost_are_stated() -> None:
    results = some_results()
    results.values["keep-alive", HOST_PATH, 1] = [90.0, 180.0, 270.0]
    rows = [row for row in report.ratios(results).splitlines() if "to published port" in row and "keep-alive" in row]
    assert "| 0.90 | 0.95 | **not met** |" in rows[0]
    assert "| 0.80 | 0.78 | met |" in rows[1]
    assert f"| download | 3 | {HOST_PATH} | {HAPROXY_HOST} (0.50) |" in report.losses(results)


def test_page_has_only_sections_that_were_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report, "PICTURES", tmp_path)
    page = report.page(some_results())
    assert "## Three backends" in page
    assert "## Many backends" not in page
    assert "198 (98 to 294)" not in page
    assert "196 (98 to 294)" in page
    assert {path.name for path in tmp_path.glob("*.svg")} >= {"keep-alive-1.svg", "download.svg"}


@pytest.mark.skipif(not STORED.exists(), reason="no result is stored")
def test_page_in_docs_is_that_of_the_stored_results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report, "PICTURES", tmp_path)
    assert report.PAGE.read_text() == report.page(Results.read(STORED)), "tests/bench/run.sh --report writes it"
