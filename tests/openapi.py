"""Makes docs/openapi.yaml from the manager's table of routes and its message types.

PYTHONPATH=manager python tests/openapi.py > docs/openapi.yaml
"""

from __future__ import annotations

import inspect
import sys
from typing import Any

import msgspec
import yaml
from werkzeug.http import HTTP_STATUS_CODES

from web.app import ROUTES, Route
from web.schemas import MAX_TEXT, Text

REF = "#/components/schemas/{name}"
LINE = {"text/plain": {"schema": {"type": "string"}}}
HEAD = {
    "openapi": "3.1.0",
    "info": {
        "title": "Load balancer: the manager",
        "version": "1",
        "description": "Reads from loopback need no token; all other calls over TCP need it. Calls with the tag "
        "`operator` are accepted through run/PROJECT/manager.sock only, which needs no token. A refused "
        "request gets one line of text.",
    },
}


def document() -> dict[str, Any]:
    """The whole description as JSON."""
    types = [type_ for route in ROUTES for type_ in (route.query, route.body, route.answer) if type_ is not None]
    schemas, components = msgspec.json.schema_components(types, schema_hook=_text_schema, ref_template=REF)
    by_type = {repr(type_): schema for type_, schema in zip(types, schemas, strict=True)}
    paths: dict[str, Any] = {}
    for route in ROUTES:
        query = components[route.query.__name__] if route.query else {"properties": {}}
        paths.setdefault(route.path, {})[route.method.lower()] = _operation(route, by_type, query)
    for route in ROUTES:
        if route.query:
            components.pop(route.query.__name__)
    bearer = {"type": "http", "scheme": "bearer", "description": "the content of run/PROJECT/token"}
    return {
        **HEAD,
        "paths": paths,
        "components": {"schemas": dict(sorted(components.items())), "securitySchemes": {"token": bearer}},
    }


def _text_schema(type_: type) -> dict[str, Any]:
    assert type_ is Text
    return {"type": "string", "minLength": 1, "maxLength": MAX_TEXT, "description": "printable characters only"}


def _operation(route: Route, by_type: dict[str, Any], query: dict[str, Any]) -> dict[str, Any]:
    operation: dict[str, Any] = {"summary": inspect.getdoc(route.handler)}
    if route.operator_only:
        operation["tags"] = ["operator"]
    else:
        operation["security"] = [{}, {"token": []}] if route.method == "GET" else [{"token": []}]
    parameters = [{"name": name, "in": "query", "schema": schema} for name, schema in query["properties"].items()]
    if parameters:
        operation["parameters"] = parameters
    if route.body:
        content = {"application/json": {"schema": by_type[repr(route.body)]}}
        operation["requestBody"] = {"required": True, "content": content}
    operation["responses"] = _responses(route, by_type)
    return operation


def _responses(route: Route, by_type: dict[str, Any]) -> dict[str, Any]:
    statuses = {401, 403, *route.statuses}
    statuses |= {400} if route.query or route.body else set()
    statuses |= {413} if route.body else set()
    statuses |= {204} if route.answer is None else set()
    responses = {}
    if route.answer is not None:
        media_type = "text/plain" if route.answer is str else "application/json"
        content = {media_type: {"schema": by_type[repr(route.answer)]}}
        responses["200"] = {"description": "OK", "content": content}
    for status in sorted(statuses):
        description = HTTP_STATUS_CODES[status]
        is_refusal = status >= 400
        responses[str(status)] = {"description": description, **({"content": LINE} if is_refusal else {})}
    return responses


class _NoAliases(yaml.SafeDumper):
    """Writes equal parts out, instead of referring to the first one."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def text() -> str:
    # JSON first: YAML has no name for tuples and enums.
    plain = msgspec.json.decode(msgspec.json.encode(document()))
    return yaml.dump(plain, Dumper=_NoAliases, sort_keys=False, width=110, allow_unicode=True)


if __name__ == "__main__":
    sys.stdout.write(text())
