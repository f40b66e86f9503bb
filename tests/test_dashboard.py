"""The Grafana dashboard: its queries name metrics that exist, and a real Prometheus answers them.

See workpool/docs/operating.md, "Dashboard".
"""

from __future__ import annotations

import asyncio
import json
import re
import shutil
import signal
from pathlib import Path
from typing import TYPE_CHECKING, Any

import aiohttp
import pytest

from tests.alerts.alert_cause_setup import AlertCauseSetup
from tests.alerts.alert_causes import AlertCause, start_idle_worker
from tests.alerts.prometheus import run_prometheus
from workpool.metrics.definitions import DEFINITIONS
from workpool.testing.fault import silence

if TYPE_CHECKING:
    from collections.abc import Iterator

DASHBOARD: dict[str, Any] = json.loads(
    (Path(__file__).parents[1] / "workpool/dashboards/workpool.json").read_text()
)
PANELS = [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]
VARIABLES = {
    "$environment": ".*",
    "$instance": ".*",
    "$__rate_interval": "15s",
    "$__range": "1m",
}


def read_panel_queries() -> Iterator[tuple[str, str]]:
    """Yield the panel title and the text of each query in the dashboard."""
    for panel in PANELS:
        for target in panel["targets"]:
            yield panel["title"], target["expr"]


def metric_base_name(metric: str) -> str:
    return re.sub("_(bucket|count|sum)$", "", metric)


def test_dashboard_panels_show_every_metric_and_no_unknown_metric() -> None:
    known = {row.prefixed_name for row in DEFINITIONS}
    shown = {
        name if name in known else metric_base_name(name)
        for _, query in read_panel_queries()
        for name in re.findall(r"\bworkpool_\w+", query)
    }
    assert shown == known


def test_dashboard_query_selects_only_labels_that_its_metric_has() -> None:
    rows = {row.prefixed_name: row for row in DEFINITIONS}
    for title, query in read_panel_queries():
        for name, matchers in re.findall(r"\b(workpool_\w+)\{([^}]*)\}", query):
            row = rows.get(name) or rows[metric_base_name(name)]
            labels = re.findall(r'(\w+)!?=~?"', matchers)
            assert set(labels) <= {*row.labels, "instance"}, title
            assert ("environment_id" in labels) == ("environment_id" in row.labels), title


def test_dashboard_panels_do_not_overlap_and_have_unique_ids() -> None:
    ids = [panel["id"] for panel in DASHBOARD["panels"]]
    assert len(set(ids)) == len(ids)
    cells = [
        (x, y)
        for panel in DASHBOARD["panels"]
        for grid in [panel["gridPos"]]
        for x in range(grid["x"], grid["x"] + grid["w"])
        for y in range(grid["y"], grid["y"] + grid["h"])
    ]
    assert len(set(cells)) == len(cells)
    assert max(x for x, _ in cells) < 24


@pytest.mark.trial
@pytest.mark.timeout(300)
async def test_every_dashboard_query_has_a_result_after_an_outage_and_ended_workers(
    tmp_path: Path,
) -> None:
    program = shutil.which("prometheus")
    if program is None:
        pytest.skip("prometheus is not installed")
    settings = {"STATS_INTERVAL": "1"}
    cause = AlertCause(start_idle_worker, settings=settings)
    async with (
        AlertCauseSetup("env-of-the-dashboard", cause, tmp_path) as setup,
        run_prometheus(program, tmp_path, setup.ports, seconds=1) as url,
    ):
        killed, drained = await setup.start_worker(), await setup.start_worker()
        setup.enqueue_items(count=10)
        setup.enqueue_items(count=3, do="fail")
        await setup.wait_for_claims(13)
        setup.enqueue_items(count=4, seconds="600")
        await setup.wait_for_claims(17)
        await wait_for_query_value(url, 'sum(workpool_slots{state="busy"})', 4)
        killed.kill()
        with setup.faults.add(silence(applied=False)):
            timeouts = 'sum(workpool_http_requests_total{code="timeout"})'
            await wait_for_query_value(url, timeouts, 1)
        await setup.start_worker()
        setup.enqueue_items(count=5)
        await setup.wait_for_claims(22)
        drained.send_signal(signal.SIGTERM)
        await drained.wait()
        drains = "sum(max_over_time(workpool_drain_duration_seconds_count[2m]))"
        # An ended worker has no current value in Prometheus, so query the last two minutes.
        await wait_for_query_value(url, drains, 1)
        empty = [
            f"{title}: {query}"
            for title, query in read_panel_queries()
            if not await query_had_recent_value(url, query)
        ]
    assert empty == []


async def wait_for_query_value(url: str, query: str, value: float) -> None:
    """Wait until a query of Prometheus returns the given value."""
    async with asyncio.timeout(60), aiohttp.ClientSession() as http:
        while True:
            found = await _query_prometheus(http, url, query)
            if found and float(found[0]["value"][1]) >= value:
                return
            await asyncio.sleep(0.5)


async def query_had_recent_value(url: str, query: str) -> bool:
    """Return whether a query of Prometheus has had a value in the last minute."""
    for variable, value in VARIABLES.items():
        query = query.replace(variable, value)
    async with aiohttp.ClientSession() as http:
        return bool(await _query_prometheus(http, url, f"last_over_time(({query})[1m:1s])"))


async def _query_prometheus(http: aiohttp.ClientSession, url: str, query: str) -> list[Any]:
    async with http.get(f"{url}/api/v1/query", params={"query": query}) as answer:
        body = await answer.json()
    assert body["status"] == "success", f"{query}: {body}"
    found: list[Any] = body["data"]["result"]
    return found
