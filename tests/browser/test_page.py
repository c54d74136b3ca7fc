"""The manager's page in a real browser, over the real application and a fake engine."""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("playwright.sync_api", reason="needs the package playwright")

from playwright.sync_api import Locator, Page

from browser import checks
from browser.stage import HOUR, Stage, a_busy_hour
from core.load import Report, Sample
from fakes import eventually

MARKUP = "<script>document.title='taken'</script><img src=x onerror=\"document.title='taken'\">"


@pytest.fixture
def busy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Stage]:
    """After an hour of use."""
    monkeypatch.setattr("core.settings.ROOT", tmp_path)
    made = Stage(tmp_path, past=HOUR)
    a_busy_hour(made)
    yield made
    made.close()


def test_the_page_agrees_with_the_status(page: Page, busy: Stage) -> None:
    checks.agrees_with_the_status(page, busy.base_url)
    displayed = {row["name"]: row for row in checks.rows(page)}
    assert displayed[f"{busy.name}1"]["state"] == "◑ draining"
    assert displayed[f"{busy.name}1"]["note"] == "drained by the operator"
    assert any(row["state"] == "✕ failed" and "exit code 137" in row["note"] for row in displayed.values())
    widths = page.eval_on_selector_all(".share i i", "bars => bars.map(bar => parseFloat(bar.style.width))")
    assert widths == pytest.approx([float(row["share"].split()[0]) for row in displayed.values()], abs=0.06)
    assert page.inner_text("#settings div:has(dt:text-is('stable-window')) dd") == "60"
    headers = page.eval_on_selector_all("thead th[scope=col]", "cells => cells.map(cell => cell.textContent)")
    assert headers == ["name", "address", "state", "share", "conn/s", "packets/s", "active"]


def test_a_scale_out_is_on_the_page_within_two_seconds(page: Page, stage: Stage) -> None:
    stage.report(150, 150)
    checks.agrees_with_the_status(page, stage.base_url)
    stage.report(690)
    decided_at = time.monotonic()
    checks.until(page, lambda: "CREATE_SERVER ▲ 2→5" in page.inner_text("#sentence"), "the decision")
    checks.until(page, lambda: len(checks.rows(page)) == 5, "the new backends")
    assert time.monotonic() - decided_at < 2
    assert page.inner_text("#desired").startswith("5 desired")
    spoken = page.locator("[aria-live=polite]").text_content()
    decided = "CREATE_SERVER 420 packets/s over 2 backends = 210 each, target 100 (2.10×)"
    assert spoken == f"2 of 5 backends serve. {decided}"
    assert page.get_attribute("#notices p", "class") == "note", "normal until they are ready"


def test_a_decision_is_marked_in_the_charts_with_its_reason(page: Page, busy: Stage) -> None:
    checks.marks_the_last_decision(page, busy.base_url)


def test_a_button_changes_the_time_range_and_is_remembered(page: Page, busy: Stage) -> None:
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


def test_the_page_keeps_its_state_while_the_manager_does_not_answer(page: Page, stage: Stage) -> None:
    stage.report(150, 150)
    checks.agrees_with_the_status(page, stage.base_url)
    checks.charts_are_drawn(page)
    known = _points(page)
    stage.stop_server()
    checks.until(page, lambda: "The manager does not answer" in page.inner_text("#notices"), "the problem is displayed")
    assert len(checks.rows(page)) == 2, "the last state is kept"
    stage.report(160)
    stage.restart_server()
    checks.until(page, lambda: page.inner_text("#notices") == "", "the problem is over")
    checks.until(page, lambda: _points(page) == known + 1, "the chart continues")


def _points(page: Page) -> int:
    return int(page.evaluate("document.getElementById('load').data[0].x.length"))


def test_a_restarted_manager_adds_to_the_charts_of_an_open_page(page: Page, stage: Stage, tmp_path: Path) -> None:
    stage.report(150, 150, 150)
    page.goto(stage.base_url)
    checks.charts_are_drawn(page)
    assert _points(page) == 2
    stage.controller._history = type(stage.controller._history)()
    stage.report(160)
    checks.until(page, lambda: _points(page) == 3, "old and new")
    page.evaluate("updates = FULL_FETCH")
    checks.until(page, lambda: page.evaluate("updates > FULL_FETCH"), "the whole history came")
    assert _points(page) == 3


def test_problems_are_displayed(page: Page, stage: Stage) -> None:
    stage.report(150, 150)
    page.goto(stage.base_url)
    checks.until(page, lambda: len(checks.rows(page)) == 2, "the fleet")
    assert page.inner_text("#notices") == ""
    stage.controller.pause(True)
    stage.engine.die(f"{stage.name}1", 3)
    stage.controller.step()
    stage.engine.down = "connection refused"
    assert eventually(lambda: (stage.controller.step(), stage.controller.engine_trouble)[1])
    checks.until(page, lambda: page.locator("#notices p").count() == 5, "the notices")
    notices = page.inner_text("#notices")
    assert "Paused. Decisions are recorded, but not carried out." in notices
    assert "Problem: the engine is unreachable: connection refused" in notices
    assert "Problem: a backend or its launch failed: its container ended with exit code 3" in notices
    assert "Problem: 1 of 2 backends serve" in notices
    assert re.search(r"Launches wait: the next one is in [\d.]+ s", notices)
    spoken = page.locator("[aria-live=polite]").text_content() or ""
    assert "the engine is unreachable: connection refused. a backend or its launch failed: " in spoken
    assert "Paused." in spoken


def test_a_manager_without_any_report_is_no_error(page: Page, stage: Stage) -> None:
    failures: list[str] = []
    page.on("pageerror", lambda error: failures.append(str(error)))
    checks.agrees_with_the_status(page, stage.base_url)
    assert "No report yet." in page.inner_text("#sentence")
    assert "no balancer reports" in page.inner_text("#notices")
    assert "No data yet" in page.inner_text("#load")
    assert failures == []


def test_on_a_phone_nothing_is_cut_off(page: Page, busy: Stage) -> None:
    checks.fits_the_width(page, busy.base_url)


def test_a_dark_scheme_is_dark_in_the_charts_too(page: Page, busy: Stage) -> None:
    checks.follows_the_scheme(page, busy.base_url)


def test_every_request_of_the_page_goes_to_the_manager(page: Page, busy: Stage) -> None:
    checks.requests_go_only_to_the_manager(page, busy.base_url)


def test_names_reasons_and_log_records_are_inserted_as_text(page: Page, stage: Stage) -> None:
    stage.engine.run(f"{stage.name}{MARKUP}")
    stage.controller.step()
    stage.report(150, 150, balancer=MARKUP)
    ip = stage.controller.status()["backends"][0]["ip"]
    stage.engine.stuck = True
    stage.controller.stop(ip, MARKUP)
    stage.report(900, balancer=MARKUP)
    decision = stage.controller._history.changes[-1]
    decision["reason"] = f"{MARKUP} &lt;b&gt; <b>bold</b> <a href='http://192.0.2.1'>link</a>"
    stage.controller.decisions[-1] = replace(stage.controller.decisions[-1], reason=MARKUP)
    logging.getLogger("manager").warning("a line of %s", MARKUP)
    checks.marks_the_last_decision(page, stage.base_url)
    names, notes = zip(*((row["name"], row["note"]) for row in checks.rows(page)), strict=True)
    assert f"{stage.name}{MARKUP}" in names
    assert MARKUP in notes
    assert MARKUP in page.inner_text("#sentence")
    checks.until(page, lambda: MARKUP in (page.text_content("#log") or ""), "the log record is displayed")
    assert decision["reason"] in page.inner_text("#changes")
    assert "taken" not in page.title()
    assert page.locator("body script, body img, .hoverlayer a").count() == 0


@pytest.mark.parametrize(
    ("name", "width", "dark"), [("light", 1600, False), ("dark", 1600, True), ("phone", 390, False)]
)
def test_a_screenshot_is_taken_when_the_charts_are_drawn(
    page: Page, busy: Stage, tmp_path: Path, name: str, width: int, dark: bool
) -> None:
    page.set_viewport_size({"width": width, "height": 1000})
    checks.screenshot(page, busy.base_url, tmp_path / f"{name}.png", dark)
    assert (tmp_path / f"{name}.png").stat().st_size > 50_000


def details(page: Page, name: str) -> Locator:
    """The details of a backend, which are open."""
    return page.locator(f"#fleet tr:has(button:text-is('{name}')) + .detail")


def test_the_self_check_panic_mode_and_an_update_are_displayed(page: Page, stage: Stage) -> None:
    stage.report(150, 150)
    page.goto(stage.base_url)
    checks.until(page, lambda: page.inner_text("#checks dd >> nth=0") == "no result yet", "the self-check")
    assert page.locator("#checks dd").all_inner_texts() == ["no result yet", "off", "none"]

    # The self-check passes.
    stage.controller.path.take_result({"t": ""}, [])
    checks.until(page, lambda: page.inner_text("#self-check") == "✓ clients reach the service", "it passes")

    # A balancer is in panic mode, and the load has passed twice the capacity.
    stage.controller.scale(None, 3, None)
    stage.report(1200, 1200, panic=True)
    rotation = "rotation: fewer than half of the backends are healthy, so all stay in rotation (b1)"
    scaling = "scaling: a burst, so no scale-in"
    checks.until(page, lambda: page.inner_text("#panic") == f"{rotation}; {scaling}", "both kinds")
    assert "Panic mode: fewer than half of the backends are healthy" in page.inner_text("#notices")
    stage.settle()
    stage.report(100)
    checks.until(page, lambda: page.inner_text("#panic") == scaling, "panic of the scaler alone")


def test_the_failing_probe_of_an_adopted_backend_is_displayed(page: Page, stage: Stage) -> None:
    ip = stage.controller.status()["backends"][0]["ip"]
    unhealthy = Sample(0, 0, 0, 0, healthy=False, why="HTTP status 503")
    stage.controller.report(Report("b1", "r", 2.0, {ip: unhealthy}))
    page.goto(stage.base_url)
    checks.until(page, lambda: len(checks.rows(page)) == 2, "the backends")
    assert [row["note"] for row in checks.rows(page)] == ["HTTP status 503; adopted", "adopted"]


def test_the_progress_of_an_update_is_displayed(page: Page, stage: Stage) -> None:
    stage.report(150, 150)
    stage.controller._backoff.spec = "image-2"
    stage.controller.step()
    page.goto(stage.base_url)
    expected = "1 of 3 replaced: a new backend becomes ready"
    checks.until(page, lambda: page.inner_text("#update") == expected, "the launch")
    stage.settle()
    stage.report(150)
    expected = "2 of 3 replaced: an old backend drains"
    checks.until(page, lambda: page.inner_text("#update") == expected, "the drain")
    assert "Updating: 2 of 3 backends are replaced." in page.inner_text("#notices")


def test_details_of_a_backend_are_opened_and_closed_with_the_keyboard(page: Page, busy: Stage) -> None:
    page.goto(busy.base_url)
    name = f"{busy.name}1"
    button = page.locator(f"#fleet button:text-is('{name}')")
    button.focus()
    assert button.get_attribute("aria-expanded") == "false"
    page.keyboard.press("Enter")
    assert button.get_attribute("aria-expanded") == "true"
    checks.until(page, lambda: "Share in the last 30 min" in details(page, name).inner_text(), "the shares")
    text = details(page, name).inner_text()
    assert re.search(r"^draining since \d\d/\d\d/\d{4}, [\d:]{8}: drained by the operator$", text, re.MULTILINE), text
    assert re.search(r"[\d.]+ % to [\d.]+ %, now 0.0 %\.", text), text
    assert len(details(page, name).locator("polyline").get_attribute("points").split()) == 180
    page.keyboard.press("Space")
    assert button.get_attribute("aria-expanded") == "false"
    assert page.locator("#fleet .detail").count() == 0


def test_details_stay_with_their_backend_and_keep_the_focus_when_another_is_removed(page: Page, busy: Stage) -> None:
    page.goto(busy.base_url)
    name = f"{busy.name}4"
    page.locator(f"#fleet button:text-is('{name}')").click()
    checks.until(page, lambda: "active since" in details(page, name).inner_text(), "the details")
    assert "a probe succeeded" in details(page, name).inner_text()
    busy.engine.stuck = False
    busy.settle()
    busy.report(640)
    checks.until(page, lambda: f"{busy.name}2" not in page.inner_text("#fleet"), "the failed backend is removed")
    assert "active since" in details(page, name).inner_text()
    assert page.evaluate("document.activeElement.textContent") == name
    assert page.locator("#fleet .detail").count() == 1


def figures(course: dict[str, Any]) -> str:
    """The sentence on a fleet of an answer of /what-if."""
    size = f"{course['backend_hours']:.2f} backend-hours, at most {course['peak']} backends"
    return f"{size}, {course['changes']} changes, at most {course['highest_load']:.1f} packets/s each"


def test_what_if_presents_the_actual_and_the_simulated_fleet(page: Page, busy: Stage) -> None:
    page.goto(busy.base_url)
    checks.until(page, lambda: page.input_value("[name=target]") == "100", "the settings in force")
    assert [page.input_value(f"[name={name}]") for name in ("stable_window", "panic_window")] == ["60", "6"]
    page.fill("[name=target]", "50")
    page.keyboard.press("Enter")
    checks.until(page, lambda: page.inner_text("#what-if-result"), "the figures")
    found = page.request.get(f"{busy.base_url}/what-if?target=50").json()
    assert page.inner_text("#what-if-result") == (
        f"The last 60 min. Actual: {figures(found['actual'])}. "
        f"With target 50, stable-window 60, panic-window 6: {figures(found['simulated'])}."
    )
    assert found["simulated"]["backend_hours"] > 1.3 * found["actual"]["backend_hours"]
    drawn = page.evaluate("document.getElementById('what-if-chart').data.map(line => [line.name, line.y])")
    assert drawn == [["actual", found["actual"]["backends"]], ["simulated", found["simulated"]["backends"]]]


@pytest.mark.parametrize(
    ("field", "value", "refused", "line"),
    [
        ("target", "-1", "target", "--target (LB_TARGET) is '-1'; allowed: 0.001 to 1000000000"),
        (
            "stable_window",
            "",
            "stable_window",
            "--stable-window (LB_STABLE_WINDOW) is ''; allowed: 1 to 3600 (seconds)",
        ),
        (
            "stable_window",
            "5",
            "panic_window",
            "--interval 2, --panic-window 6 and --stable-window 5 must not decrease in this order",
        ),
    ],
)
def test_what_if_presents_a_refusal_next_to_the_field(
    page: Page, stage: Stage, field: str, value: str, refused: str, line: str
) -> None:
    stage.report(150, 150)
    page.goto(stage.base_url)
    checks.until(page, lambda: page.input_value("[name=target]") == "100", "the settings in force")
    page.fill(f"[name={field}]", value)
    page.click("#what-if button")
    checks.until(page, lambda: page.inner_text(f"label:has([name={refused}]) + [role=alert]") == line, "the refusal")
    assert page.get_attribute("[aria-invalid=true]", "name") == refused
    assert page.evaluate("document.activeElement.name") == refused
    assert page.get_attribute(f"[name={refused}]", "aria-describedby") == "refusal"
    page.fill("[name=target]", "80")
    page.fill("[name=stable_window]", "60")
    page.click("#what-if button")
    checks.until(page, lambda: page.inner_text("#what-if-result").startswith("The last 0 min."), "the figures")
    assert page.locator("[aria-invalid=true]").count() == 0
    assert page.text_content("#refusal") == ""


def test_what_if_says_that_the_manager_does_not_answer(page: Page, stage: Stage) -> None:
    failures: list[str] = []
    page.on("pageerror", lambda error: failures.append(str(error)))
    page.goto(stage.base_url)
    checks.until(page, lambda: page.input_value("[name=target]") == "100", "the settings in force")
    stage.stop_server()
    page.click("#what-if button")
    checks.until(page, lambda: page.inner_text("#refusal") == "The manager does not answer.", "the line")
    assert failures == []


def test_axe_finds_no_serious_problem(page: Page, busy: Stage) -> None:
    """With problems, an open row of details, a refusal and a result."""
    page.goto(busy.base_url)
    checks.charts_are_drawn(page)
    checks.has_no_serious_accessibility_finding(page)
    page.locator("#fleet button").first.click()
    page.click("#what-if button")
    checks.until(page, lambda: page.inner_text("#what-if-result"), "the figures")
    page.fill("[name=target]", "0")
    page.click("#what-if button")
    checks.until(page, lambda: page.inner_text("#refusal"), "the refusal")
    checks.has_no_serious_accessibility_finding(page)


def test_axe_finds_no_serious_problem_on_a_phone(page: Page, busy: Stage) -> None:
    page.set_viewport_size({"width": 390, "height": 844})
    page.goto(busy.base_url)
    checks.charts_are_drawn(page)
    page.locator("#fleet button").first.click()
    checks.has_no_serious_accessibility_finding(page)


@pytest.mark.parametrize("width", [390, 1600])
def test_the_tab_key_reaches_everything_in_order_and_the_focus_is_visible(page: Page, stage: Stage, width: int) -> None:
    page.set_viewport_size({"width": width, "height": 844})
    stage.report(150, 150)
    page.goto(stage.base_url)
    checks.until(page, lambda: len(checks.rows(page)) == 2, "the fleet")
    reached = []
    while True:
        page.keyboard.press("Tab")
        stop = page.evaluate(
            """() => { const one = document.activeElement; const style = getComputedStyle(one);
                return [one.name || one.id || one.textContent, style.outlineStyle, style.outlineWidth]; }"""
        )
        if stop[0] in ("", *reached) or page.evaluate("document.activeElement === document.body"):
            break
        reached.append(stop[0])
        assert stop[1:] == ["solid", "2px"], stop
    ranges, fields = ["10 min", "1 h", "24 h"], ["target", "stable_window", "panic_window"]
    names = [f"{stage.name}1", f"{stage.name}2"]
    assert reached == [*ranges, *names, "changes", *fields, "Replay", "log"]
    order = page.eval_on_selector_all(".card", "cards => cards.map(card => getComputedStyle(card).order)")
    assert set(order) == {"0"}, "the order on the screen is that of the file"


def test_screen_readers_hear_of_a_change_once_and_of_nothing_else(page: Page, stage: Stage) -> None:
    stage.report(150, 150)
    page.goto(stage.base_url)
    checks.until(page, lambda: page.text_content("#spoken"), "the first announcement")
    page.evaluate(
        """() => {
            window.heard = [];
            const live = document.querySelectorAll('[aria-live], [role=status], [role=alert]');
            const observer = new MutationObserver((changes) => changes.forEach((one) => heard.push(one.target.id)));
            live.forEach((one) => observer.observe(one, { childList: true, characterData: true, subtree: true }));
        }"""
    )
    updates = page.evaluate("updates")
    for number in range(3):
        stage.report(150 + number)
        checks.until(page, lambda number=number: page.evaluate("updates") > updates + 1 + number, "an update")
    assert page.evaluate("heard") == [], "the load alone is not announced"
    stage.report(150, panic=True)
    checks.until(page, lambda: "Panic mode: " in (page.text_content("#spoken") or ""), "the announcement")
    assert set(page.evaluate("heard")) == {"spoken"}
