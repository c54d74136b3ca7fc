"""docs/openapi.yaml is current, and the manager keeps to it: schemathesis sends requests that it makes from it."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    negative_data_rejection,
    response_schema_conformance,
    status_code_conformance,
)

import openapi
from fakes import TOKEN, Clock, FakeEngine, controller
from web.app import ROUTES, Route, as_operator, create_app

DOCUMENT = Path(__file__).parents[3] / "docs" / "openapi.yaml"
CHECKS = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_schema_conformance,
    negative_data_rejection,
]


def test_the_document_is_current() -> None:
    command = "PYTHONPATH=manager python tests/openapi.py > docs/openapi.yaml"
    assert DOCUMENT.read_text() == openapi.text(), f"update it: {command}"


@pytest.fixture
def described(tmp_path: Path) -> Any:
    """The calls that the document describes, answered by a manager with two backends, for its operator."""
    manager = controller(FakeEngine("p-backend-1", "p-backend-2"), tmp_path, Clock())
    manager.adopt(None)
    operator = as_operator(create_app(manager, TOKEN, []))
    document = openapi.document()
    for methods in document["paths"].values():
        for operation in methods.values():
            operation.pop("security", None)  # the operator needs no token

    def application(environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
        if environ["PATH_INFO"] != "/openapi.json":
            return operator(environ, start_response)
        start_response("200 OK", [("Content-Type", "application/json")])
        return [json.dumps(document).encode()]

    return schemathesis.openapi.from_wsgi("/openapi.json", application)


VALID = [(route, GenerationMode.POSITIVE) for route in ROUTES]
INVALID = [(route, GenerationMode.NEGATIVE) for route in ROUTES if route.body or route.query]


@pytest.mark.parametrize(("route", "mode"), VALID + INVALID, ids=lambda value: getattr(value, "path", value))
def test_each_call_keeps_to_the_document(described: Any, route: Route, mode: GenerationMode) -> None:
    @settings(max_examples=10, suppress_health_check=list(HealthCheck))
    @given(described[route.path][route.method].as_strategy(mode))
    def check(case: Any) -> None:
        case.call_and_validate(checks=CHECKS)

    check()


def test_the_document_has_every_route() -> None:
    described = {(method.upper(), path) for path, methods in openapi.document()["paths"].items() for method in methods}
    assert described == {(route.method, route.path) for route in ROUTES}
