"""The manager's page in a real browser, over the real application and a fake engine."""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("playwright.sync_api", reason="needs the package playwright")

from playwright.sync_api import Page

from browser import checks
from browser.stage import HOUR, Stage, a_busy_hour
from fakes import eventually

MARKUP = "<script>document.title='taken'</script><img src=x onerror=\"document.title='taken'\">"


@pytest.fixture
def busy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Stage]:
    """As it is after an hour of use."""
    monkeypatch.setattr("core.settings.ROOT", tmp_path)
    made = Stage(tmp_path, past=HOUR)
    a_busy_hour(made)
    yield made
    made.close()


def test_the_page_says_what_the_status_says(page: Page, busy: Stage) -> None:
    checks.agrees_with_the_status(page, busy.base_url)
    shown = {row["name"]: row for row in checks.rows(page)}
    assert shown[f"{busy.name}1"]["state"] == "◑ draining"
    assert shown[f"{busy.name}1"]["note"] == "drained by the operator"
    assert any(row["state"] == "✕ failed" and "exit code 137" in row["note"] for row in shown.values())
    widths = page.eval_on_selector_all(".share i i", "bars => bars.map(bar => parseFloat(bar.style.width))")
    assert widths == pytest.approx([float(row["share"].split()[0]) for row in shown.values()], abs=0.06)
    assert page.inner_text("#settings div:has(dt:text-is('stable-window')) dd") == "60"
    headers = page.eval_on_selector_all("thead th[scope=col]", "cells => cells.map(cell => cell.textContent)")
    assert headers == ["name", "address", "state", "share", "conn/s", "packets/s", "active"]


def test_a_scale_out_is_on_the_page_within_two_seconds(page: Page, stage: Stage) -> None:
    stage.hear(150, 150)
    checks.agrees_with_the_status(page, stage.base_url)
    stage.hear(690)
    decided = time.monotonic()
    checks.until(page, lambda: "CREATE_SERVER ▲ 2→5" in page.inner_text("#sentence"), "the sentence")
    checks.until(page, lambda: len(checks.rows(page)) == 5, "the new backends")
    assert time.monotonic() - decided < 2
    assert page.inner_text("#wanted").startswith("5 wanted")
    spoken = page.locator("[aria-live=polite]").text_content()
    assert spoken == "CREATE_SERVER 420 packets/s over 2 backends = 210 each, target 100 (2.10×)"


def test_a_decision_is_marked_where_it_happened_with_its_sentence(page: Page, busy: Stage) -> None:
    checks.marks_the_last_decision(page, busy.base_url)


def test_a_button_changes_the_time_that_is_shown_and_is_remembered(page: Page, busy: Stage) -> None:
    page.goto(busy.base_url)
    checks.charts_are_drawn(page)
    span = """['load', 'size'].map(id => document.getElementById(id).layout.xaxis.range)
        .map(([from, to]) => Math.round((to - from) / 1000))"""
    assert page.evaluate(span) == [600, 600]
    page.click("text=24 h")
    assert page.evaluate(span) == [86400, 86400]
    page.reload()
    checks.charts_are_drawn(page)
    assert page.evaluate(span) == [86400, 86400]
    assert page.inner_text("[aria-pressed=true]") == "24 h"


def test_the_page_outlives_the_manager_and_says_so_meanwhile(page: Page, stage: Stage) -> None:
    stage.hear(150, 150)
    checks.agrees_with_the_status(page, stage.base_url)
    checks.charts_are_drawn(page)
    known = _points(page)
    stage.go_away()
    checks.until(page, lambda: "The manager does not answer" in page.inner_text("#troubles"), "the trouble is told")
    assert len(checks.rows(page)) == 2, "what was known is still there"
    stage.hear(160)
    stage.come_back()
    checks.until(page, lambda: page.inner_text("#troubles") == "", "the trouble is over")
    checks.until(page, lambda: _points(page) == known + 1, "the chart goes on where it was")


def _points(page: Page) -> int:
    return int(page.evaluate("document.getElementById('load').data[0].x.length"))


def test_a_new_manager_adds_to_the_charts_that_an_open_page_has(page: Page, stage: Stage, tmp_path: Path) -> None:
    stage.hear(150, 150, 150)
    page.goto(stage.base_url)
    checks.charts_are_drawn(page)
    assert _points(page) == 2
    stage.controller._history = type(stage.controller._history)()
    stage.hear(160)
    checks.until(page, lambda: _points(page) == 3, "old and new")
    page.evaluate("asked = WHOLE")
    checks.until(page, lambda: page.evaluate("asked > WHOLE"), "the whole history came")
    assert _points(page) == 3


def test_what_is_wrong_is_told_in_words(page: Page, stage: Stage) -> None:
    stage.hear(150, 150)
    page.goto(stage.base_url)
    checks.until(page, lambda: len(checks.rows(page)) == 2, "the fleet")
    assert page.inner_text("#troubles") == ""
    stage.controller.pause(True)
    stage.engine.die(f"{stage.name}1", 3)
    stage.controller.step()
    stage.engine.down = "connection refused"
    assert eventually(lambda: (stage.controller.step(), stage.controller.engine_trouble)[1])
    checks.until(page, lambda: page.locator("#troubles p").count() == 3, "three troubles")
    told = page.inner_text("#troubles")
    assert "Paused. Decisions are made and shown, not carried out." in told
    assert "Engine trouble: the fleet stays as it is: connection refused" in told
    assert re.search(r"Launch trouble: 1 in vain, next try in [\d.]+ s: its container ended with exit code 3", told)
    spoken = page.locator("[aria-live=polite]").text_content() or ""
    assert "Paused. Engine trouble: Launch trouble:" in spoken


def test_a_fleet_of_which_nothing_is_known_yet_is_no_error(page: Page, stage: Stage) -> None:
    failures: list[str] = []
    page.on("pageerror", lambda error: failures.append(str(error)))
    checks.agrees_with_the_status(page, stage.base_url)
    assert "No report yet." in page.inner_text("#sentence")
    assert "No balancer reports" in page.inner_text("#troubles")
    assert "No points yet" in page.inner_text("#load")
    assert failures == []


def test_on_a_phone_nothing_is_cut_off(page: Page, busy: Stage) -> None:
    checks.fits_the_width(page, busy.base_url)


def test_a_dark_scheme_is_dark_in_the_charts_too(page: Page, busy: Stage) -> None:
    checks.follows_the_scheme(page, busy.base_url)


def test_every_request_of_the_page_goes_to_the_manager(page: Page, busy: Stage) -> None:
    checks.asks_nobody_else(page, busy.base_url)


def test_others_words_are_shown_as_text(page: Page, stage: Stage) -> None:
    stage.engine.run(f"{stage.name}{MARKUP}")
    stage.controller.step()
    stage.hear(150, 150, balancer=MARKUP)
    ip = stage.controller.status()["backends"][0]["ip"]
    stage.engine.stuck = True
    stage.controller.stop(ip, MARKUP)
    stage.hear(900, balancer=MARKUP)
    decision = stage.controller._history.changes[-1]
    decision["reason"] = f"{MARKUP} &lt;b&gt; <b>bold</b> <a href='http://192.0.2.1'>link</a>"
    stage.controller.decisions[-1] = replace(stage.controller.decisions[-1], reason=MARKUP)
    logging.getLogger("manager").warning("a line of %s", MARKUP)
    checks.marks_the_last_decision(page, stage.base_url)
    names, notes = zip(*((row["name"], row["note"]) for row in checks.rows(page)), strict=True)
    assert f"{stage.name}{MARKUP}" in names
    assert MARKUP in notes
    assert MARKUP in page.inner_text("#sentence")
    checks.until(page, lambda: MARKUP in (page.text_content("#log") or ""), "the log's line is there")
    assert decision["reason"] in page.inner_text("#changes")
    assert "taken" not in page.title()
    assert page.locator("body script, body img, .hoverlayer a").count() == 0


@pytest.mark.parametrize(
    ("name", "width", "dark"), [("light", 1600, False), ("dark", 1600, True), ("phone", 390, False)]
)
def test_a_picture_is_taken_when_the_charts_are_drawn(
    page: Page, busy: Stage, tmp_path: Path, name: str, width: int, dark: bool
) -> None:
    page.set_viewport_size({"width": width, "height": 1000})
    checks.screenshot(page, busy.base_url, tmp_path / f"{name}.png", dark)
    assert (tmp_path / f"{name}.png").stat().st_size > 50_000
