"""docs/grafana.json: Grafana can import it, and a real Prometheus has data for each of its queries.

The manager is the real application over a fake engine, the balancer's exposition the real one over a kernel in memory.
tests/e2e/test_prometheus.py asks the same of a running system.
"""

from __future__ import annotations

import itertools
import re
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from werkzeug.serving import WSGIRequestHandler, make_server

from app import create_app
from browser.stage import Stage
from exposition import exposition
from fakes import TOKEN
from fakes_netfilter import FakeNetfilter
from grafana import ANNOTATIONS, DASHBOARD, PANELS, VARIABLES, Viewer, queries
from manager_client import ManagerClient
from prometheus import needs_prometheus, prometheus
from snapshot import Backend, Snapshot
from synchronization_client import Balancer

COLUMNS = 24  # of Grafana's grid
BACKENDS = (Backend("a", "198.18.0.2", "active"), Backend("b", "198.18.0.3", "active"))


def title(panel: dict[str, Any]) -> str:
    return str(panel["title"])


@pytest.mark.parametrize("panel", PANELS, ids=title)
def test_panel_has_a_unit_a_legend_and_says_what_to_do(panel: dict[str, Any]) -> None:
    assert panel["fieldConfig"]["defaults"]["unit"] in ("none", "short", "s", "cps", "percentunit")
    assert len(panel["description"]) > 80
    assert all(target["legendFormat"] for target in panel["targets"])
    refs = [target["refId"] for target in panel["targets"]]
    assert (len(set(refs)), "" in refs) == (len(refs), False)


def test_panels_have_ids_and_titles_of_their_own_and_do_not_overlap() -> None:
    taken: dict[tuple[int, int], str] = {}
    for panel in PANELS:
        at = panel["gridPos"]
        assert 0 <= at["x"] < at["x"] + at["w"] <= COLUMNS
        for place in itertools.product(range(at["x"], at["x"] + at["w"]), range(at["y"], at["y"] + at["h"])):
            assert place not in taken, f"{panel['title']} overlaps {taken[place]}"
            taken[place] = panel["title"]
    for field in ("id", "title"):
        assert len({panel[field] for panel in PANELS}) == len(PANELS)


def test_everything_asks_the_data_source_that_the_viewer_has_chosen() -> None:
    asking = [*PANELS, *(target for panel in PANELS for target in panel["targets"]), *ANNOTATIONS]
    asking += [variable for variable in VARIABLES if variable["type"] == "query"]
    chosen = {"type": "prometheus", "uid": "${datasource}"}
    assert [one for one in asking if one["datasource"] != chosen] == []
    assert [(one["name"], one["query"]) for one in VARIABLES if one["type"] == "datasource"] == [
        ("datasource", "prometheus")
    ]


def test_each_variable_exists_and_no_instance_is_fixed() -> None:
    known = {variable["name"] for variable in VARIABLES} | {"__interval", "__rate_interval"}
    for query in queries():
        assert set(re.findall(r"\$(\w+)", query.expression)) <= known, query
        selectors = re.findall(r"\{([^}]*)\}", query.expression)
        assert len(selectors) == len(re.findall(r"lbscaler_\w+", query.expression)), (
            f"a metric of all projects: {query}"
        )
        assert all('instance="$manager"' in one or 'instance=~"$balancer"' in one for one in selectors), query


def test_grafana_can_import_the_dashboard() -> None:
    # 39 is Grafana 10.4's and 11.0's. Later versions migrate it. An id would be that of another Grafana's dashboard.
    assert (DASHBOARD["schemaVersion"], DASHBOARD["id"], DASHBOARD["uid"]) == (39, None, "lbscaler")


class Silent(WSGIRequestHandler):
    def log(self, type: str, message: str, *args: Any) -> None:
        """Logs nothing."""


@contextmanager
def served(balancer: Balancer) -> Iterator[str]:
    """The address of the balancer's HTTP interface."""
    application = create_app(balancer.sync, lambda: exposition(balancer.state))
    server = make_server("127.0.0.1", 0, application, threaded=True, request_handler=Silent)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def rules_change(balancer: Balancer, kernel: FakeNetfilter) -> None:
    for backends in (BACKENDS[:1], BACKENDS):
        balancer.state.snapshot = Snapshot(f"r{len(backends)}", backends)
        balancer.reconciler.reconcile()
        kernel.drop("LB-FORWARD", 1)


@needs_prometheus
@pytest.mark.slow
def test_prometheus_has_data_for_every_panel_annotation_and_variable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("core.settings.ROOT", tmp_path)
    kernel = FakeNetfilter()
    balancer = Balancer(kernel, ManagerClient("127.0.0.1:1", lambda: TOKEN), "b1")
    balancer.state.prober._loop.close()  # no backend is probed
    rules_change(balancer, kernel)
    stage = Stage(tmp_path)
    stage.controller.path.take_result({"t": ""}, [])
    stage.report(100, 100)
    manager = f"127.0.0.1:{stage.port}"
    try:
        with served(balancer) as address, prometheus(tmp_path, manager, address, seconds=1) as it:
            viewer, deadline = Viewer(it, manager, address, seconds=1), time.monotonic() + 60
            while (faults := viewer.faults()) and time.monotonic() < deadline:
                # The load rises, then falls for longer than a stable window.
                for rates in ((640,) * 4, (10,) * 40):
                    stage.report(*rates)
                    stage.settle()
                    rules_change(balancer, kernel)
                    time.sleep(1.2)  # longer than the time between scrapes
    finally:
        stage.close()
    assert faults == {}
