"""The metrics that show why sessions failed, why leases were lost, and what blocks a pool.

See workpool/docs/metrics.md, "All metrics".
"""

from __future__ import annotations

import asyncio
import threading
import time
from typing import TYPE_CHECKING, Any

from tests.integration.condition_polling import wait_until
from workpool import Release, Session, handler
from workpool.events import (
    ItemReceived,
    LoopLagMeasured,
    SessionFailed,
    SessionFinished,
    SessionStarted,
)
from workpool.server import DEFAULT_ENVIRONMENT
from workpool.testing import in_virtual_time

if TYPE_CHECKING:
    from workpool import Supervisor
    from workpool.server import ControlPlane
    from workpool.testing import Kit, Recorder


def read_metric_value(pool: Supervisor, name: str, **labels: str) -> float | None:
    labels["environment_id"] = DEFAULT_ENVIRONMENT
    return pool.registry.get_sample_value(f"workpool_{name}", labels)


@handler
async def end_session_as_metadata_says(session: Session) -> dict[str, str] | None:
    match session.item.metadata.get("do"):
        case "raise":
            raise ValueError("no such report")
        case "wait":
            await asyncio.sleep(3600)
        case "release":
            raise Release("later", delay=10)
    return None


@in_virtual_time
async def test_failed_sessions_are_counted_by_kind_of_error(workpool: Kit) -> None:
    for do in ("raise", "wait", "finish"):
        workpool.enqueue(metadata={"do": do})
    async with workpool.pool(end_session_as_metadata_says, session_timeout=60) as pool:
        await workpool.wait_for(SessionFinished, count=3, timeout=120)
    counted = {
        error: read_metric_value(pool, "session_errors_total", error=error)
        for error in ("exception", "timeout", "attempts_exceeded", "result_refused", "stalled")
    }
    assert counted == {
        "exception": 1, "timeout": 1, "attempts_exceeded": 0, "result_refused": 0, "stalled": 0
    }  # fmt: skip


@in_virtual_time
async def test_session_beyond_max_attempts_is_counted_as_attempts_exceeded(workpool: Kit) -> None:
    (item,) = workpool.enqueue(metadata={"do": "wait"})
    async with workpool.pool(end_session_as_metadata_says, max_attempts=1) as pool:
        await workpool.wait_for(SessionStarted)
        workpool.lose(item)
        failed = await workpool.wait_for(SessionFailed, timeout=120)
    assert failed.error == "attempts_exceeded"
    assert read_metric_value(pool, "session_errors_total", error="attempts_exceeded") == 1


@in_virtual_time
async def test_lease_taken_by_another_worker_is_counted_as_taken(workpool: Kit) -> None:
    item = workpool.enqueue(metadata={"do": "wait"})[0]
    async with workpool.pool(end_session_as_metadata_says) as pool:
        await workpool.wait_for(SessionStarted)
        workpool.lose(item)
        await workpool.wait_for(SessionFinished, timeout=120)
        assert read_metric_value(pool, "leases_lost_total", reason="taken") == 1
        assert read_metric_value(pool, "leases_lost_total", reason="expired") == 0


@in_virtual_time
async def test_pickup_latency_is_not_measured_for_redelivered_items(workpool: Kit) -> None:
    workpool.enqueue(metadata={"do": "release"})
    async with workpool.pool(end_session_as_metadata_says) as pool:
        await workpool.wait_for(ItemReceived, count=2, timeout=120)
        assert read_metric_value(pool, "item_pickup_latency_seconds_count") == 1
        assert read_metric_value(pool, "lease_ttl_seconds") == pool.settings.lease_ttl


async def test_metrics_show_blocked_loop_while_it_is_blocked(
    control_plane: ControlPlane, recorder: Recorder, make_pool: Any
) -> None:
    may_end = threading.Event()

    @handler
    async def block_event_loop(_: Session) -> None:
        may_end.wait(50)

    seen: list[tuple[float | None, float | None, tuple[str, ...]]] = []

    def wait_for_blocked_loop_metric(pool: Supervisor) -> None:
        """Read the metrics on another thread, like a scraper, until they show the blocked loop."""
        until = time.monotonic() + 40
        while not (read_metric_value(pool, "event_loop_blocked_seconds") or 0) > 1.5:
            if time.monotonic() > until:
                break  # The assertions below fail.
            may_end.wait(0.05)
        polling = read_metric_value(pool, "pollers", state="polling")
        blocked = read_metric_value(pool, "pollers", state="blocked")
        seen.append((polling, blocked, pool.status().reasons))
        may_end.set()

    control_plane.enqueue()
    async with make_pool(block_event_loop, pollers=2) as pool:
        scraper = threading.Thread(target=wait_for_blocked_loop_metric, args=(pool,))
        scraper.start()
        await recorder.wait_for(SessionFinished)
        scraper.join()
        polling, blocked, reasons = seen[0]
        assert (polling, blocked) == (0, 2)
        assert any("event loop has been blocked for" in reason for reason in reasons)
        await recorder.wait_for(LoopLagMeasured, lambda event: event.seconds > 1)
        await wait_until(lambda: (read_metric_value(pool, "event_loop_blocked_seconds") or 0) < 1)


@in_virtual_time
async def test_stalled_session_is_counted_as_session_error_of_kind_stalled(workpool: Kit) -> None:
    workpool.enqueue(metadata={"do": "wait"})
    async with workpool.pool(end_session_as_metadata_says, stall_timeout=60) as pool:
        await workpool.wait_for(SessionFinished, timeout=120)
    assert read_metric_value(pool, "session_errors_total", error="stalled") == 1
