"""What Grafana asks Prometheus for when it shows docs/grafana.json, with the variables replaced as Grafana does it."""

from __future__ import annotations

import json
import math
import re
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prometheus import Prometheus

DASHBOARD: dict[str, Any] = json.loads((Path(__file__).parents[1] / "docs" / "grafana.json").read_text())
PANELS: list[dict[str, Any]] = DASHBOARD["panels"]
VARIABLES: list[dict[str, Any]] = DASHBOARD["templating"]["list"]
ANNOTATIONS: list[dict[str, Any]] = DASHBOARD["annotations"]["list"]
LABEL = re.compile(r"\{\{\s*(\w+)\s*\}\}")  # in a legend


@dataclass(frozen=True)
class Query:
    """One of a panel or an annotation. `labels`: those that its legend or text names."""

    name: str
    expression: str
    labels: frozenset[str]


def queries() -> list[Query]:
    """All of the dashboard, with its variables."""
    found = []
    for panel in PANELS:
        for target in panel["targets"]:
            labels = frozenset(LABEL.findall(target["legendFormat"]))
            found.append(Query(f"{panel['title']}, {target['refId']}", target["expr"], labels))
    for annotation in ANNOTATIONS:
        labels = frozenset({*LABEL.findall(annotation["textFormat"]), *annotation["tagKeys"].split(",")})
        found.append(Query(f"annotation {annotation['name']}", annotation["expr"], labels))
    return found


class Viewer:
    """Shows the dashboard from now on: `manager` and `balancer` are instances, `seconds` the time between scrapes."""

    def __init__(self, prometheus: Prometheus, manager: str, balancer: str, seconds: int) -> None:
        self._prometheus, self._seconds, self._began = prometheus, seconds, time.time()
        # A variable with several values is in a regular expression, in a quoted string: dots are escaped twice.
        self._chosen = {"manager": manager, "balancer": balancer.replace(".", "\\\\.")}

    def faults(self) -> dict[str, str]:
        """What the dashboard lacks so far, by the name of the query or the variable."""
        found = {}
        for query in queries():
            fault = self._fault(query)
            if fault:
                found[query.name] = fault
        for variable in VARIABLES:
            if variable["type"] == "query" and not self._offers(variable):
                found[variable["name"]] = f"{variable['query']} has no value {self._chosen[variable['name']]}"
        return found

    def _fault(self, query: Query) -> str:
        expression = self._replaced(query.expression)
        begin, end = f"{self._began:.3f}", f"{time.time():.3f}"
        series = self._prometheus.get("query_range", query=expression, start=begin, end=end, step=f"{self._seconds}s")
        if not any(math.isfinite(float(value)) for one in series["result"] for _, value in one["values"]):
            return f"no number: {expression}"
        without_label = [one["metric"] for one in series["result"] if not query.labels <= one["metric"].keys()]
        return f"no label {sorted(query.labels)}: {without_label}" if without_label else ""

    def _replaced(self, expression: str) -> str:
        """Grafana evaluates a short time once per scrape. A rate's window then has at least four scrapes."""
        values = {**self._chosen, "__rate_interval": f"{4 * self._seconds}s", "__interval": f"{self._seconds}s"}
        return re.sub(r"\$(\w+)", lambda match: values[match[1]], expression)

    def _offers(self, variable: dict[str, Any]) -> bool:
        """Whether a variable's query has the chosen instance among its values."""
        [(metric, label)] = re.findall(r"label_values\((\w+), (\w+)\)", variable["query"])
        offered = self._prometheus.get(f"label/{label}/values", **{"match[]": metric})
        return self._chosen[variable["name"]].replace("\\\\", "") in offered
