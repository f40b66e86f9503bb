"""The load of an environment as `workpool scale` reads it, from control planes of several kinds."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import orjson
import pytest
from aiohttp import web

from workpool.cli import fleet_reader, item_count
from workpool.cli.fleet_reader import FleetReader, compute_fleet_load
from workpool.cli.item_count import ItemCounter, ItemCounts
from workpool.errors import RefusedError, TransientError
from workpool.scaling import FleetLoad
from workpool.server import ControlPlane
from workpool.server.http.server_dialects import QODER
from workpool.settings import Settings
from workpool.wire.client import WorkClient
from workpool.wire.items import QueueStats, parse_item

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    Answer = Callable[[web.Request], Awaitable[web.StreamResponse]]

PAGE_ITEMS = 100
SECOND = timedelta(seconds=1)
NEVER_SECONDS = 3600.0


def make_client(plane: ControlPlane) -> WorkClient:
    return WorkClient(
        Settings(base_url=plane.base_url, token=plane.token, environment_id=plane.environments[0])
    )


def make_fleet_reader(client: WorkClient) -> FleetReader:
    return FleetReader(client, interval=NEVER_SECONDS, max_age=NEVER_SECONDS)


async def read_fleet_load(reader: FleetReader) -> FleetLoad:
    load = await reader.read_load()
    assert load is not None
    return load


def make_middleware_that_hides_running_count(
    *, statistics: bool = True, after_id: str = "known", newest: bool = False
) -> Any:
    """Return a middleware that removes the count of running items from the statistics.

    Args:
        statistics: Whether statistics are answered at all.
        after_id: Whether the parameter is `known`, `ignored` or `refused`.
        newest: Whether the list begins with the newest item.
    """

    @web.middleware
    async def hide_running_count(request: web.Request, handler: Answer) -> web.StreamResponse:
        if request.path.endswith("/stats"):
            if not statistics:
                error = {"type": "permission_error", "message": "not for this key"}
                return web.json_response({"type": "error", "error": error}, status=403)
            response = await handler(request)
            assert isinstance(response, web.Response)
            stats = orjson.loads(response.body)  # type: ignore[arg-type]  # bytes of our own
            del stats["running"], stats["stopped"]
            return web.json_response(stats)
        if request.path.endswith("/work"):
            request = change_item_list_query(request, after_id, newest=newest)
        return await handler(request)

    return hide_running_count


def change_item_list_query(request: web.Request, after_id: str, *, newest: bool) -> web.Request:
    query = dict(request.query)
    if "after_id" in query and after_id == "refused":
        query["after_id"] = "work_of_nobody"
    if after_id == "ignored":
        query.pop("after_id", None)
    if newest:
        query["order"] = "desc"
    return request.clone(rel_url=request.rel_url.with_query(query))


def stop_items(plane: ControlPlane, *work_ids: str) -> None:
    for work_id in work_ids:
        plane.operations.stop_item(plane.environments[0], work_id, None, force=True)


async def claim_items(client: WorkClient, count: int) -> None:
    for _ in range(count):
        item = await client.poll()
        assert item is not None
        await client.ack(item.id)


async def test_fleet_load_includes_running_items_if_statistics_count_them() -> None:
    async with ControlPlane() as plane, make_client(plane) as client:
        plane.enqueue(5)
        await claim_items(client, 2)
        assert await client.poll() is not None
        load = await read_fleet_load(make_fleet_reader(client))
        assert (load.queued, load.pending, load.running) == (2, 1, 2)
        assert (load.unfinished, load.lower_bound) == (5, False)
        assert 0 <= load.oldest_queued_seconds < 60


@pytest.mark.parametrize("newest", [False, True])
@pytest.mark.parametrize("statistics", [True, False])
async def test_running_items_are_counted_in_item_list_if_statistics_omit_running_count(
    caplog: pytest.LogCaptureFixture, *, statistics: bool, newest: bool
) -> None:
    middlewares = [make_middleware_that_hides_running_count(statistics=statistics, newest=newest)]
    async with ControlPlane(middlewares=middlewares) as plane, make_client(plane) as client:
        items = plane.enqueue(6)
        await claim_items(client, 3)
        stop_items(plane, items[0].id, items[5].id)
        reader = make_fleet_reader(client)
        for _ in range(2):
            load = await read_fleet_load(reader)
            assert (load.queued + load.pending, load.running) == (2, 2)
            assert not load.lower_bound
    assert caplog.text.count("statistics refused") == (0 if statistics else 1)


async def test_fleet_load_is_unknown_until_reader_has_read_past_all_stopped_items(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A partial count would miss the running items, and so recommend too few workers."""
    monkeypatch.setattr(item_count, "LISTED_ITEMS_MAX", 2 * PAGE_ITEMS)
    async with (
        ControlPlane(middlewares=[make_middleware_that_hides_running_count()]) as plane,
        make_client(plane) as client,
    ):
        stop_items(plane, *(item.id for item in plane.enqueue(5 * PAGE_ITEMS)))
        plane.enqueue(5)
        await claim_items(client, 4)
        reader = make_fleet_reader(client)
        assert [await reader.read_load() for _ in range(2)] == [None, None]
        for _ in range(2):
            load = await read_fleet_load(reader)
            assert (load.running, load.lower_bound) == (4, False)


async def test_fleet_reader_becomes_ready_once_its_reads_reach_items_after_stopped_ones(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(item_count, "LISTED_ITEMS_MAX", PAGE_ITEMS)
    monkeypatch.setattr(fleet_reader, "HISTORY_SECONDS", 0.01)
    async with (
        ControlPlane(middlewares=[make_middleware_that_hides_running_count()]) as plane,
        make_client(plane) as client,
    ):
        stop_items(plane, *(item.id for item in plane.enqueue(3 * PAGE_ITEMS)))
        plane.enqueue(2)
        reader = make_fleet_reader(client)
        assert reader.unready_reasons() == ["the queue is not read to its end yet"]
        async with asyncio.TaskGroup() as group:
            reading = group.create_task(reader.read_load_periodically())
            for _ in range(2000):
                if reader.latest_load is not None:
                    break
                await asyncio.sleep(0.01)
            reading.cancel()
        assert reader.latest_load is not None
        assert (reader.latest_load.unfinished, reader.unready_reasons()) == (2, [])


async def test_fleet_load_of_long_item_list_stays_unknown_if_control_plane_refuses_cursor(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(item_count, "LISTED_ITEMS_MAX", PAGE_ITEMS)
    middlewares = [make_middleware_that_hides_running_count(after_id="refused")]
    async with ControlPlane(middlewares=middlewares) as plane, make_client(plane) as client:
        stop_items(plane, *(item.id for item in plane.enqueue(3 * PAGE_ITEMS)))
        reader = make_fleet_reader(client)
        assert [await reader.read_load() for _ in range(4)] == [None] * 4


async def test_fleet_load_is_lower_bound_if_long_item_list_begins_with_newest_item(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(item_count, "LISTED_ITEMS_MAX", PAGE_ITEMS)
    middlewares = [make_middleware_that_hides_running_count(newest=True)]
    async with ControlPlane(middlewares=middlewares) as plane, make_client(plane) as client:
        stop_items(plane, *(item.id for item in plane.enqueue(3 * PAGE_ITEMS)))
        plane.enqueue(2)
        await claim_items(client, 2)
        load = await read_fleet_load(make_fleet_reader(client))
        assert (load.running, load.lower_bound) == (2, True)


@pytest.mark.parametrize("after_id", ["known", "ignored", "refused"])
async def test_item_count_is_exact_whether_control_plane_knows_ignores_or_refuses_cursor(
    after_id: str,
) -> None:
    middlewares = [make_middleware_that_hides_running_count(after_id=after_id)]
    async with ControlPlane(middlewares=middlewares) as plane, make_client(plane) as client:
        stop_items(plane, *(item.id for item in plane.enqueue(PAGE_ITEMS)))
        plane.enqueue(4)
        await claim_items(client, 3)
        counter = ItemCounter(client)
        for _ in range(3):
            count = await counter.count_items()
            assert (count.queued, count.running, count.complete) == (1, 3, True)
        assert counter._after is not None


@pytest.mark.parametrize(
    ("order", "skips"),
    [("by creation", True), ("newest first", False), ("by random id", False)],
)
async def test_item_counter_skips_stopped_items_only_in_list_ordered_by_creation(
    order: str, *, skips: bool
) -> None:
    """In a list with any other order, a new item could be among the skipped items."""
    async with ControlPlane() as plane, make_client(plane) as client:
        item = plane.enqueue(1)[0]
        shown = parse_item(QODER.item_json(item) | {"state": "stopped"})
        assert shown.created_at is not None
        ages = (
            range(PAGE_ITEMS)
            if order != "by random id"
            else [n * 37 % PAGE_ITEMS for n in range(PAGE_ITEMS)]
        )
        items = [
            replace(shown, id=f"work_{number:032x}", created_at=shown.created_at + age * SECOND)
            for number, age in enumerate(ages)
        ]
        if order == "newest first":
            items.reverse()
        counter = ItemCounter(client)
        counter._skip_stopped_items_next_time(items)
        assert (counter._after is not None) == skips


async def test_item_counter_that_skips_stopped_items_still_counts_running_items() -> None:
    """Skipping stopped items must never hide a running item."""
    async with (
        ControlPlane(middlewares=[make_middleware_that_hides_running_count()]) as plane,
        make_client(plane) as client,
    ):
        items = plane.enqueue(PAGE_ITEMS + 3)
        await claim_items(client, PAGE_ITEMS + 3)
        counter = ItemCounter(client)
        assert (await counter.count_items()).running == PAGE_ITEMS + 3
        stop_items(plane, *(item.id for item in items[1:]))
        assert await counter.count_items() == ItemCounts(0, 1, None, complete=True)
        stop_items(plane, items[0].id)
        assert [(await counter.count_items()).running for _ in range(2)] == [0, 0]
        plane.enqueue(2)
        await claim_items(client, 1)
        count = await counter.count_items()
        assert (count.queued, count.running, count.complete) == (1, 1, True)


def test_item_that_is_both_pending_and_running_is_counted_once_in_load() -> None:
    stats = QueueStats(depth=1, pending=5, oldest_queued_at=None, workers_polling=2)
    count = ItemCounts(queued=1, running=5, oldest_queued_at=None, complete=True)
    assert compute_fleet_load(stats, count) == FleetLoad(1, 0, 5)
    assert compute_fleet_load(stats, count._replace(complete=False)) == FleetLoad(
        1, 5, 5, lower_bound=True
    )


async def test_refused_item_list_request_raises_error_and_leaves_fleet_load_unknown(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async with ControlPlane() as plane:
        (other := ControlPlane()).port = plane.port
        async with make_client(other) as client:  # `plane` refuses the token of this client
            reader = make_fleet_reader(client)
            with pytest.raises(RefusedError):
                await reader.read_load()
            assert reader.latest_load is None
            assert reader.unready_reasons() == ["the queue is not read to its end yet"]
    assert "statistics refused" not in caplog.text


@pytest.mark.parametrize(("asked", "wait"), [(None, 0), (40.0, 40), (9000.0, 300)])
async def test_fleet_reader_waits_after_error_as_long_as_control_plane_asks(
    asked: float | None, wait: float
) -> None:
    async with ControlPlane() as plane, make_client(plane) as client:
        error = TransientError("stats", 503, "busy", reason="throttled", retry_after=asked)
        assert make_fleet_reader(client)._record_failure(error) == wait
