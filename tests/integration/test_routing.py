"""Several handlers in one pool, and the cost of unwanted items.

See workpool/docs/routing.md, "Routing".
"""

from __future__ import annotations

import asyncio
import importlib
import re
from importlib import resources
from typing import TYPE_CHECKING, Any

import pytest

from workpool import Session, Supervisor, handler, hookimpl
from workpool.events import ItemDeclined, SessionFinished, SessionStarted
from workpool.server import DEFAULT_ENVIRONMENT
from workpool.testing import in_virtual_time

if TYPE_CHECKING:
    from workpool import WorkItem
    from workpool.testing import Kit

MINUTE_SECONDS = 60.0


@handler
async def any_session_handler(_: Session) -> dict[str, str]:
    return {"by": "any_session"}


@handler(metadata={"job": "report"}, timeout=5 * MINUTE_SECONDS)
async def handle_report_item(session: Session) -> dict[str, str]:
    return await sleep_for_minutes(session, "report")


@handler(metadata={"job": "report", "size": "huge"}, timeout=50 * MINUTE_SECONDS, max_sessions=1)
async def huge_report_handler(session: Session) -> dict[str, str]:
    return await sleep_for_minutes(session, "huge_report")


@handler(type="job")
async def job_handler(_: Session) -> dict[str, str]:
    return {"by": "job"}


class HeavyItemPlugin:
    """A plugin whose hook selects items by weight, because no rule can compare weights."""

    @hookimpl
    def workpool_session_handler(self, item: WorkItem) -> Any:
        heavy = int(item.metadata.get("weight", "0")) > 100
        return self.handle_heavy_item if heavy else None

    async def handle_heavy_item(self, _: Session) -> dict[str, str]:
        return {"by": "carry"}


async def sleep_for_minutes(session: Session, by: str) -> dict[str, str]:
    await asyncio.sleep(float(session.item.metadata.get("minutes", "0")) * MINUTE_SECONDS)
    return {"by": by}


ALL_HANDLERS = (
    HeavyItemPlugin(),
    any_session_handler,
    handle_report_item,
    huge_report_handler,
    job_handler,
)


@pytest.mark.parametrize(
    ("work_type", "metadata", "by"),
    [
        ("session", {}, "any_session"),
        ("session", {"size": "huge"}, "any_session"),
        ("session", {"job": "report"}, "report"),
        ("session", {"job": "report", "size": "small"}, "report"),
        ("session", {"job": "report", "size": "huge"}, "huge_report"),
        ("session", {"job": "report", "size": "huge", "weight": "101"}, "carry"),
        ("session", {"weight": "99"}, "any_session"),
        ("job", {"job": "report"}, "job"),
    ],
)
@in_virtual_time
async def test_each_item_is_run_by_handler_of_most_specific_rule(
    workpool: Kit, work_type: str, metadata: dict[str, str], by: str
) -> None:
    (item,) = workpool.enqueue(metadata=metadata, work_type=work_type)
    async with workpool.pool(*ALL_HANDLERS):
        finished = await workpool.wait_for(SessionFinished)
    assert finished.outcome == "completed"
    assert workpool.item(item).metadata["by"] == by


@in_virtual_time
async def test_timeout_of_handler_replaces_session_timeout(workpool: Kit) -> None:
    for size in ("small", "huge"):
        workpool.enqueue(metadata={"job": "report", "size": size, "minutes": "60"})
    async with workpool.pool(*ALL_HANDLERS, session_timeout=1):
        small, huge = [await workpool.wait_for(SessionFinished, count=count) for count in (1, 2)]
    assert (small.outcome, huge.outcome) == ("timed_out", "timed_out")
    assert small.seconds == pytest.approx(5 * MINUTE_SECONDS, abs=1)
    assert huge.seconds == pytest.approx(50 * MINUTE_SECONDS, abs=1)


@in_virtual_time
async def test_item_of_busy_handler_is_declined_before_ack_and_delays_no_other_handler(
    workpool: Kit,
) -> None:
    huge = {"job": "report", "size": "huge", "minutes": "10"}
    workpool.enqueue(count=2, metadata=huge)
    async with workpool.pool(*ALL_HANDLERS):
        await workpool.wait_for(SessionStarted)
        declined = await workpool.wait_for(ItemDeclined)
        assert declined.reason == "busy"
        (small,) = workpool.enqueue(metadata={"job": "report"})
        first = await workpool.wait_for(SessionFinished)
        assert first.session.item.id == small.id
        second = await workpool.wait_for(SessionFinished, count=2)
        acked = [each for each in workpool.server.history if each.kind == "acked"]
        assert declined.item.id not in {each.work_id for each in acked}
        third = await workpool.wait_for(SessionFinished, count=3)
    assert third.session.item.id == declined.item.id != second.session.item.id
    assert {each.outcome for each in (first, second, third)} == {"completed"}


def compute_declines_per_poll(pool: Supervisor) -> float:
    """Return the declined items per poll, the ratio that the alert WorkpoolPollsWasted uses."""
    named = {"environment_id": DEFAULT_ENVIRONMENT}

    def sum_metric_values(name: str, label: str, *values: str) -> float:
        found = [pool.registry.get_sample_value(name, named | {label: each}) for each in values]
        return sum(each or 0 for each in found)

    declined = sum_metric_values(
        "workpool_items_declined_total", "reason", "unwanted", "busy", "plugin_error"
    )
    return declined / sum_metric_values("workpool_polls_total", "result", "item", "null")


def read_threshold_of_wasted_polls_alert() -> float:
    """Return the ratio above which the alert WorkpoolPollsWasted fires."""
    text = resources.files("workpool").joinpath("alerts.yml").read_text("utf-8")
    # mypy has no types of `yaml`, so an `import` statement would not pass its check.
    yaml = importlib.import_module("yaml")
    rules = [rule for group in yaml.safe_load(text)["groups"] for rule in group["rules"]]
    (expr,) = [rule["expr"] for rule in rules if rule.get("alert") == "WorkpoolPollsWasted"]
    return float(re.findall(r"> ([\d.]+)\s*$", expr)[0])


@pytest.mark.parametrize("pollers", [1, 2])
@in_virtual_time
async def test_items_of_another_pool_delay_no_matching_item_and_cause_no_alert(
    workpool: Kit, pollers: int
) -> None:
    workpool.enqueue(count=3, metadata={"job": "of another pool"})
    async with workpool.pool(handle_report_item, pollers=pollers) as pool:
        for count in range(1, 30):
            await asyncio.sleep(20)
            workpool.enqueue(metadata={"job": "report"})
            finished = await workpool.wait_for(SessionFinished, count=count, timeout=10)
            assert finished.outcome == "completed"
        assert 0.1 < compute_declines_per_poll(pool) < read_threshold_of_wasted_polls_alert()


@pytest.mark.parametrize("pollers", [1, 2])
@in_virtual_time
async def test_wanted_item_is_never_delivered_if_too_many_unwanted_items_are_queued(
    workpool: Kit, pollers: int
) -> None:
    workpool.enqueue(count=30, metadata={"job": "of another pool"})
    async with workpool.pool(handle_report_item, pollers=pollers) as pool:
        await asyncio.sleep(60)
        (wanted,) = workpool.enqueue(metadata={"job": "report"})
        await asyncio.sleep(10 * MINUTE_SECONDS)
        assert compute_declines_per_poll(pool) > read_threshold_of_wasted_polls_alert()
        assert workpool.item(wanted).state == "queued"
        assert workpool.item(wanted).delivered_at is None
        # A second pool has a handler for any item. It runs the items that the first pool declined,
        # and then the wanted item.
        async with workpool.pool(any_session_handler):
            await workpool.wait_for(SessionFinished, count=31)
    assert workpool.item(wanted).state == "stopped"
