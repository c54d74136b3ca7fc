"""Serves the files of the manager's page, with a Content-Security-Policy: a browser loads nothing from elsewhere."""

from __future__ import annotations

from functools import cache
from importlib import resources
from pathlib import Path

from flask import Blueprint, Response, request

STATIC = Path(__file__).with_name("static")
TYPES = {"html": "text/html", "js": "text/javascript", "css": "text/css"}
DAY = 86400  # seconds
# The page loads nothing from elsewhere and sends nothing elsewhere. Plotly adds style elements, hence 'unsafe-inline'.
POLICY = (
    "default-src 'none'; script-src 'self'; connect-src 'self'; style-src 'self' 'unsafe-inline'; img-src data:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)

page = Blueprint("page", __name__)


@page.get("/", defaults={"name": "index.html"})
@page.get("/<any('page.js', 'charts.js', 'page.css'):name>")
def page_file(name: str) -> Response:
    return _cacheable(name, (STATIC / name).read_bytes(), max_age=0)


@page.get("/plotly.js")
def plotly() -> Response:
    return _cacheable("plotly.js", _plotly(), max_age=DAY)


@page.after_app_request
def add_security_headers(answer: Response) -> Response:
    answer.headers["Content-Security-Policy"] = POLICY
    answer.headers["X-Content-Type-Options"] = "nosniff"
    return answer


@cache  # 4 MB: all answers share one copy, also while slow clients receive it
def _plotly() -> bytes:
    return (resources.files("plotly") / "package_data" / "plotly.min.js").read_bytes()


def _cacheable(name: str, content: bytes, max_age: int) -> Response:
    """The file, or status 304 if the browser has it already."""
    answer = Response(content, mimetype=TYPES[name.rpartition(".")[2]])
    # With 0, a browser checks the entity tag each time, so an old page is never used with a new manager.
    answer.cache_control.max_age = max_age
    answer.add_etag()
    answer.make_conditional(request)
    return answer
