"""Checks of the page against the manager at an address, a real one or one over a fake engine."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Page

PARTS = ("page.js", "charts.js", "page.css", "plotly.js")
WITHIN = 15.0  # seconds
ROWS = """rows => rows.map(row => Object.fromEntries(
    [...row.querySelectorAll('[data-field]')].map(cell => [cell.dataset.field, cell.textContent])))"""


def until(page: Page, condition: Callable[[], Any], what: str, within: float = WITHIN) -> Any:
    """The first true value of `condition`. The page keeps running."""
    deadline = time.monotonic() + within
    while not (value := condition()):
        assert time.monotonic() < deadline, f"not within {within:g} s: {what}"
        page.wait_for_timeout(50)
    return value


def charts_are_drawn(page: Page) -> None:
    for chart in ("load", "size"):
        page.wait_for_selector(f"#{chart} .scatterlayer .js-line", state="attached")


def status(page: Page, base_url: str) -> dict[str, Any]:
    return dict(page.request.get(f"{base_url}/status").json())


def rows(page: Page) -> list[dict[str, str]]:
    """The table of backends."""
    return list(page.eval_on_selector_all("#fleet tr:not(.detail)", ROWS))


def agrees_with_the_status(page: Page, base_url: str) -> None:
    """Numbers have one decimal. Page and status agree soon after each report."""
    page.goto(base_url)
    until(page, lambda: _difference(page, base_url) == "", "page and status agree")


def _difference(page: Page, base_url: str) -> str:
    now, displayed = status(page, base_url), rows(page)
    if [row["name"] for row in displayed] != [backend["name"] for backend in now["backends"]]:
        return "the names"
    for row, backend in zip(displayed, now["backends"], strict=True):
        if row["state"].split()[-1] != backend["state"]:
            return f"the state of {row['name']}"
        expected_cells = {"share": 100 * backend["share"], **{name: backend[name] for name in _NUMBERS}}
        for name, value in expected_cells.items():
            if abs(_number(row[name]) - value) > 0.051:
                return f"{name} of {row['name']}: {row[name]} for {value}"
    active = sum(backend["state"] == "active" for backend in now["backends"])
    expected = {
        "active": active,
        "desired": now["desired"],
        "rate": now["rate"] or 0,
        "balancers": len(now["balancers"]),
    }
    for name, value in expected.items():
        if abs(_number(page.inner_text(f"#{name}")) - value) > 0.051:
            return f"{name}: {page.inner_text(f'#{name}')} for {value}"
    return ""


_NUMBERS = ("connections_rate", "packets_rate", "active")


def _number(text: str) -> float:
    """The number at the start of a cell; 0 for a dash."""
    number = text.split(maxsplit=1)[0].replace(",", "")
    return 0.0 if number == "–" else float(number)


def marks_the_last_decision(page: Page, base_url: str) -> None:
    """Both charts mark it at its time, and pointing at the mark displays its reason."""
    page.goto(base_url)
    last = page.request.get(f"{base_url}/history").json()["decisions"][-1]
    charts_are_drawn(page)
    for chart in ("load", "size"):
        until(page, lambda c=chart: _hovered(page, c, last), f"the decision is marked in {chart}: {last}")


def _hovered(page: Page, chart: str, decision: dict[str, Any]) -> bool:
    found = page.evaluate(
        """([chart, time]) => {
            const drawn = document.getElementById(chart);
            const curve = drawn.data.findIndex((one) => one.name === 'decisions');
            const point = drawn.data[curve].x.findIndex((x) => Math.abs(x - 1000 * time) < 2);
            if (point < 0) return null;
            Plotly.Fx.hover(chart, [{ curveNumber: curve, pointNumber: point }]);
            return drawn.querySelector('.hoverlayer').textContent;
        }""",
        [chart, decision["time"]],
    )
    return found is not None and _squeezed(decision["reason"]) in _squeezed(found)


def _squeezed(text: str) -> str:
    return "".join(text.split())


def fits_the_width(page: Page, base_url: str, width: int = 390) -> None:
    """Nothing scrolls sideways or is wider than the window."""
    page.set_viewport_size({"width": width, "height": 844})
    page.goto(base_url)
    charts_are_drawn(page)
    page.wait_for_selector("#fleet tr")
    beyond = page.evaluate(
        """() => [...document.querySelectorAll('body *')].filter((one) => !one.closest('svg, .unseen, thead'))
            .filter((one) => one.getBoundingClientRect().right > innerWidth + 1 || one.scrollWidth > one.clientWidth + 1
                && one.clientWidth && getComputedStyle(one).display !== 'inline')
            .map((one) => one.outerHTML.slice(0, 80))"""
    )
    assert beyond == []
    assert page.evaluate("document.documentElement.scrollWidth") <= width


def follows_the_scheme(page: Page, base_url: str) -> None:
    """The page and its charts change with the scheme."""
    page.goto(base_url)
    charts_are_drawn(page)
    for scheme, dark in (("dark", True), ("light", False)):
        page.emulate_media(color_scheme=scheme)  # type: ignore[arg-type]
        for place, property_ in (("body", "background-color"), (".card", "background-color")):
            assert (_brightness(page, place, property_) < 80) is dark, f"{place} in the {scheme} scheme"
        for place in (".xtick text", ".legendtext"):
            until(
                page,
                lambda p=place, d=dark: (_brightness(page, p, "fill") > 110) is d,
                f"{place} in the {scheme} scheme",
            )


def _brightness(page: Page, place: str, property_: str) -> float:
    # One call finds and reads the element, because a redrawn chart replaces its elements.
    colour = page.evaluate(
        "([place, name]) => getComputedStyle(document.querySelector(place))[name]", [place, property_]
    )
    red, green, blue = (float(part) for part in colour.partition("(")[2].rstrip(")").split(",")[:3])
    return 0.3 * red + 0.6 * green + 0.1 * blue


def requests_go_only_to_the_manager(page: Page, base_url: str) -> None:
    """All requests go to the manager, and the policy that enforces it causes no error."""
    requested: list[str] = []
    errors: list[str] = []
    page.on("request", lambda request: requested.append(request.url))
    page.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.goto(base_url)
    charts_are_drawn(page)
    page.click("text=24 h")
    until(page, lambda: sum(url.endswith("/status") for url in requested) >= 2, "the page updates")
    assert {f"{base_url}/", *(f"{base_url}/{part}" for part in PARTS)} <= set(requested)
    assert [url for url in requested if not url.startswith((f"{base_url}/", "data:"))] == []
    assert errors == []


def screenshot(page: Page, url: str, path: Path, dark: bool) -> None:
    """The whole page, after its charts are drawn."""
    page.emulate_media(color_scheme="dark" if dark else "light")
    page.goto(url)
    charts_are_drawn(page)
    page.wait_for_selector("#fleet tr")
    page.wait_for_timeout(1500)  # the bars' transition ends
    page.screenshot(path=path, full_page=True)


def has_no_serious_accessibility_finding(page: Page) -> None:
    """axe-core finds nothing of impact serious or critical in the page as it is now, in either scheme."""
    for scheme in ("light", "dark"):
        page.emulate_media(color_scheme=scheme)  # type: ignore[arg-type]
        page.wait_for_timeout(300)  # the charts are drawn in the new colours
        found = []
        for violation in Axe().run(page).response["violations"]:
            if violation["impact"] in ("serious", "critical"):
                found.append((violation["id"], [node["html"][:120] for node in violation["nodes"]]))
        assert found == [], scheme
