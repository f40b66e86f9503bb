"""The engine of a control plane has the same results in memory, on SQLite and on PostgreSQL."""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import pytest

from tests.protocol.conftest import CLOUD, ENV, OTHER
from workpool.server import APIError, ControlPlane, Poll, state_machine, summarize
from workpool.server.conversation import EVERY_EVENT, EventFilter
from workpool.server.parsing.creation_requests import NewEnvironment, NewSession
from workpool.server.parsing.request_values import ItemFilter, ListPageRequest
from workpool.server.queue.work_queue import WorkQueueStats
from workpool.server.state_machine import last_heartbeat
from workpool.server.stored_session import SessionFilter

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from tests.manual_clock import ManualClock
    from workpool.server import Item, PostgresStore, Store
    from workpool.server.engine import ControlPlaneEngine

FIRST_PAGE = ListPageRequest(20, "", None)
MESSAGE = {"type": "user.message", "content": [{"type": "text", "text": "go\0on"}]}
SCRIPT = [{"name": "bash", "input": {"command": "true"}}]
WAIT_SECONDS = 40


def client_is_never_disconnected() -> bool:
    return False


pytestmark = pytest.mark.usefixtures("memory_and_sqlite_stores")


@pytest.fixture
async def engine(
    store: Store | PostgresStore, clock: ManualClock
) -> AsyncIterator[ControlPlaneEngine]:
    async with open_engine(store, clock) as engine:
        yield engine


@asynccontextmanager
async def open_engine(
    store: Store | PostgresStore, clock: ManualClock | None
) -> AsyncIterator[ControlPlaneEngine]:
    engine = ControlPlane(
        environments=(ENV, OTHER), cloud_environments=(CLOUD,), store=store, now=clock
    ).engine
    try:
        await engine.open()
        async with asyncio.timeout(WAIT_SECONDS):
            yield engine
    finally:
        engine.end_waiting_calls()
        await engine.close()


async def claim_item(engine: ControlPlaneEngine, worker: str = "a", **poll: Any) -> Item:
    item = await engine.long_poll(ENV, Poll(worker, **poll), client_is_never_disconnected)
    assert item is not None
    return item


async def create_active_item(engine: ControlPlaneEngine, worker: str = "a") -> Item:
    """Create an item, poll it for a worker, acknowledge it and send its first heartbeat."""
    (item,) = await engine.enqueue(ENV)
    await claim_item(engine, worker)
    await engine.ack_item(ENV, item.id, worker)
    return await engine.heartbeat(ENV, item.id, "NO_HEARTBEAT", 30, worker)


async def get_error_status_of_call(call: Any) -> int:
    with pytest.raises(APIError) as caught:
        await call
    return caught.value.status


async def test_item_goes_through_every_state_from_creation_to_stop(
    engine: ControlPlaneEngine, clock: ManualClock
) -> None:
    (created,) = await engine.enqueue(ENV, metadata={"k": "v\0"})
    assert created.state == "queued"
    delivered = await claim_item(engine)
    assert (delivered.id, delivered.holder, delivered.metadata) == (created.id, "a", {"k": "v\0"})
    assert await engine.long_poll(ENV, Poll("b"), client_is_never_disconnected) is None
    clock.advance(1)
    acked = await engine.ack_item(ENV, created.id, "a")
    assert (acked.state, acked.holder) == ("starting", "a")
    assert await engine.ack_item(ENV, created.id, "a") == acked
    clock.advance(1)
    beaten = await engine.heartbeat(ENV, created.id, "NO_HEARTBEAT", 30, "a")
    assert (beaten.state, beaten.ttl_seconds) == ("active", 30)
    clock.advance(1)
    again = await engine.heartbeat(ENV, created.id, last_heartbeat(beaten), 40, "a")
    assert again.lease_end == int(clock() * 1e6) + 40_000_000
    changed = await engine.update_metadata(ENV, created.id, {"k": None, "result": "1"}, "a")
    assert changed.metadata == {"result": "1"}
    assert (await engine.stop_item(ENV, created.id, "a")).state == "stopping"
    stopped = await engine.stop_item(ENV, created.id, "a")
    assert stopped.state == "stopped"
    assert await engine.get_item(ENV, created.id) == stopped
    assert await engine.stop_item(ENV, created.id, "a") == stopped


async def test_history_of_item_is_recorded_in_order(engine: ControlPlaneEngine) -> None:
    item = await create_active_item(engine)
    await engine.heartbeat(ENV, item.id, last_heartbeat(item), 30, "a")
    assert await get_error_status_of_call(engine.ack_item(ENV, item.id, "b")) == 409
    await engine.stop_item(ENV, item.id, "a", force=True)
    records = await engine.read_history()
    assert [record.kind for record in records] == [
        "created",
        "delivered",
        "acked",
        "heartbeat",
        "heartbeat",
        "conflict",
        "stopped",
    ]
    assert [record.op for record in records[3:6]] == ["blind", None, "ack"]
    assert summarize(records)._asdict() == {
        "enqueued": 1,
        "stopped": 1,
        "reclaimed": 0,
        "lost": 0,
        "overlapping": 0,
    }


@pytest.mark.parametrize("seconds", [1, 30])
@pytest.mark.parametrize("expected", ["last", "wrong", "NO_HEARTBEAT", None])
@pytest.mark.parametrize("state", ["active", "stopping"])
@pytest.mark.parametrize("compare_on_stop", [True, False])
async def test_every_engine_answers_heartbeat_as_the_item_state_machine_defines(
    engine: ControlPlaneEngine,
    clock: ManualClock,
    seconds: int,
    expected: str | None,
    state: str,
    compare_on_stop: bool,  # noqa: FBT001 - a parameter of the test
) -> None:
    """PostgreSQL runs a heartbeat as one statement, with the same results as the state machine."""
    item = await create_active_item(engine)
    if state == "stopping":
        item = await engine.stop_item(ENV, item.id)
    if expected in {"last", "wrong"}:
        expected = last_heartbeat(item) if expected == "last" else "2026-03-01T12:00:00.000001Z"
    clock.advance(seconds)
    now = int(clock() * 1e6)
    before = state_machine.end_lease(item) if (item.lease_end or 0) <= now else item
    try:
        wanted: Item | int = state_machine.extend_lease(
            before, expected, 45, now, compare_on_stop=compare_on_stop
        )
    except APIError as error:
        wanted = error.status
    call = engine.heartbeat(ENV, item.id, expected, 45, "a", compare_on_stop=compare_on_stop)
    found = await get_error_status_of_call(call) if isinstance(wanted, int) else await call
    assert found == wanted


async def test_items_are_delivered_oldest_first(engine: ControlPlaneEngine) -> None:
    items = [*await engine.enqueue(ENV, count=3), *await engine.enqueue(ENV, count=2)]
    assert [(await claim_item(engine)).id for _ in items] == [item.id for item in items]
    assert await engine.long_poll(ENV, Poll("a"), client_is_never_disconnected) is None


async def test_expired_lease_returns_item_to_queue(
    engine: ControlPlaneEngine, clock: ManualClock
) -> None:
    item = await create_active_item(engine)
    later = await engine.enqueue(ENV)
    clock.advance(30)
    assert (await engine.get_item(ENV, item.id)).state == "queued"
    assert (
        await get_error_status_of_call(
            engine.heartbeat(ENV, item.id, last_heartbeat(item), 30, "a")
        )
        == 409
    )
    assert (await claim_item(engine, "b")).id == item.id
    assert (await claim_item(engine, "b")).id == later[0].id
    assert (await engine.ack_item(ENV, item.id, "b")).holder == "b"
    kinds = [record.kind for record in await engine.read_history() if record.work_id == item.id]
    assert kinds.count("lapsed") == 1


async def test_item_in_state_stopping_is_stopped_once_its_lease_expires(
    engine: ControlPlaneEngine, clock: ManualClock
) -> None:
    item = await create_active_item(engine)
    await engine.stop_item(ENV, item.id)
    clock.advance(30)
    found = await engine.get_item(ENV, item.id)
    assert (found.state, found.stopped_at) == ("stopped", item.lease_end)
    assert (await engine.queue_stats(ENV)).stopped == 1


async def test_unacknowledged_item_is_delivered_again_after_reclaim_window(
    engine: ControlPlaneEngine, clock: ManualClock
) -> None:
    (item,) = await engine.enqueue(ENV)
    await claim_item(engine, "a")
    clock.advance(2)
    assert await engine.long_poll(ENV, Poll("b", 0, 3000), client_is_never_disconnected) is None
    assert (await claim_item(engine, "b", reclaim_older_than_ms=2000)).holder == "b"
    assert await get_error_status_of_call(engine.ack_item(ENV, item.id, "a")) == 409


async def test_poll_whose_client_has_disconnected_leaves_item_in_queue(
    engine: ControlPlaneEngine,
) -> None:
    (item,) = await engine.enqueue(ENV)
    answers = iter([False, True, True])
    assert await engine.long_poll(ENV, Poll("a"), lambda: next(answers)) is None
    assert (await engine.get_item(ENV, item.id)).delivered_at is None
    assert (await claim_item(engine, "b")).id == item.id


async def test_waiting_poll_wakes_for_new_item(engine: ControlPlaneEngine) -> None:
    async with asyncio.TaskGroup() as group:
        polls = [
            group.create_task(
                engine.long_poll(ENV, Poll("a", 999_000), client_is_never_disconnected)
            )
            for _ in "ab"
        ]
        # Let the polls wait for an item. The test also passes if they start after the enqueue.
        await asyncio.sleep(0.05)
        items = await engine.enqueue(ENV, count=2)
    assert {item.id for poll in polls if (item := poll.result())} == {item.id for item in items}


async def test_method_end_waiting_calls_ends_waiting_poll_and_event_stream(
    engine: ControlPlaneEngine,
) -> None:
    (item,) = await engine.enqueue(OTHER)
    async with asyncio.TaskGroup() as group:
        poll = group.create_task(
            engine.long_poll(ENV, Poll("a", 999_000), client_is_never_disconnected)
        )
        stream = group.create_task(engine.wait_for_events(item.session_id, 0, 999.0))
        # Let both calls wait. The test also passes if they start after `end_waiting_calls`.
        await asyncio.sleep(0.05)
        engine.end_waiting_calls()
    assert poll.result() is None
    assert stream.result() is None


@pytest.mark.parametrize("name", ["ack_item", "heartbeat", "stop_item", "get_item"])
@pytest.mark.parametrize("work_id", ["work_" + 32 * "0", "\0", "\udc80", 200 * "x"])
async def test_call_for_unknown_item_is_404(
    engine: ControlPlaneEngine, name: str, work_id: str
) -> None:
    assert await get_error_status_of_call(getattr(engine, name)(ENV, work_id)) == 404


async def test_read_of_item_under_another_environment_id_is_404(engine: ControlPlaneEngine) -> None:
    (item,) = await engine.enqueue(OTHER)
    assert await get_error_status_of_call(engine.get_item(ENV, item.id)) == 404


async def test_concurrent_updates_and_stop_of_one_item_are_all_applied(
    engine: ControlPlaneEngine,
) -> None:
    item = await create_active_item(engine)
    async with asyncio.TaskGroup() as group:
        for number in range(12):
            group.create_task(engine.update_metadata(ENV, item.id, {str(number): "x"}, "a"))
        group.create_task(engine.stop_item(ENV, item.id, "a", force=True))
    found = await engine.get_item(ENV, item.id)
    assert (found.state, len(found.metadata)) == ("stopped", 12)
    assert (await engine.queue_stats(ENV)).stopped == 1


async def test_concurrent_claims_deliver_each_item_once(engine: ControlPlaneEngine) -> None:
    items = await engine.enqueue(ENV, count=20)
    found = await asyncio.gather(
        *(engine.long_poll(ENV, Poll("a"), client_is_never_disconnected) for _ in range(25))
    )
    # Two concurrent polls can choose the same item, and only one poll receives it. The other poll
    # may return None although items are left, so the remaining items are polled below.
    ids = [item.id for item in found if item is not None]
    while (
        item := await engine.long_poll(ENV, Poll("a"), client_is_never_disconnected)
    ) is not None:
        ids.append(item.id)
    assert sorted(ids) == [item.id for item in items]


async def test_statistics_count_every_state(engine: ControlPlaneEngine, clock: ManualClock) -> None:
    await create_active_item(engine, "a")
    stopped = await create_active_item(engine, "b")
    await engine.stop_item(ENV, stopped.id, force=True)
    (oldest, *_) = await engine.enqueue(ENV, count=3)
    await claim_item(engine, "c")
    assert (await engine.queue_stats(ENV))._replace(read_at=0) == WorkQueueStats(
        2, 1, oldest.created_at, 3, 1, 1, read_at=0
    )
    clock.advance(5)
    assert (await engine.queue_stats(ENV)).pending == 0
    assert (await engine.queue_stats(OTHER))._replace(read_at=0) == WorkQueueStats(
        0, 0, None, 0, 0, 0, read_at=0
    )


async def test_item_list_can_be_read_forward_and_backward_page_by_page(
    engine: ControlPlaneEngine,
) -> None:
    items = list(await engine.enqueue(ENV, count=5))
    await engine.enqueue(OTHER)
    page = await engine.list_items(ENV, ListPageRequest(2, "", None))
    assert (list(page.items), page.has_more) == (items[:2], True)
    page = await engine.list_items(ENV, ListPageRequest(3, items[1].id, None))
    assert (list(page.items), page.has_more) == (items[2:], False)
    page = await engine.list_items(ENV, ListPageRequest(2, "", items[4].id))
    assert (list(page.items), page.has_more, page.backwards) == (items[2:4], True, True)


async def test_item_search_filters_and_orders_items(engine: ControlPlaneEngine) -> None:
    items = list(await engine.enqueue(ENV, count=4))
    for item in items[:2]:
        await engine.update_metadata(ENV, item.id, {"workpool.error": "E"})
        await engine.stop_item(ENV, item.id)
    queued = await engine.list_items(
        ENV, FIRST_PAGE, ItemFilter("queued", failed=False, newest_first=True)
    )
    assert [item.id for item in queued.items] == [items[3].id, items[2].id]
    page = await engine.list_items(
        ENV, ListPageRequest(1, "", None), ItemFilter(None, failed=True, newest_first=False)
    )
    assert ([item.id for item in page.items], page.has_more) == ([items[0].id], True)


async def test_environments_are_created_and_listed(engine: ControlPlaneEngine) -> None:
    assert (
        await get_error_status_of_call(engine.require_self_hosted_environment("env_unknown")) == 404
    )
    assert await get_error_status_of_call(engine.require_self_hosted_environment("\0")) == 404
    assert await get_error_status_of_call(engine.require_self_hosted_environment(CLOUD)) == 400
    created = await engine.create_environment(NewEnvironment("a\0b", None, {"k": "v"}))
    await engine.require_self_hosted_environment(created.id)
    assert await engine.get_environment(created.id) == created
    page = await engine.list_environments(FIRST_PAGE, None)
    assert [each.id for each in page.items] == sorted([ENV, OTHER, CLOUD, created.id])
    page = await engine.list_environments(
        ListPageRequest(1, "", None), frozenset({ENV, created.id})
    )
    assert len(page.items) == 1
    assert page.has_more


def make_new_session(**fields: Any) -> NewSession:
    values: dict[str, Any] = {
        "environment_id": ENV,
        "agent": {"id": "agent_1"},
        "title": None,
        "metadata": {},
        "initial_events": (),
        "script": None,
    }
    return NewSession(**{**values, **fields})


async def test_session_is_created_read_and_archived(engine: ControlPlaneEngine) -> None:
    created = await engine.create_session(
        make_new_session(title="t\0", metadata={"k": "v"}, initial_events=[MESSAGE])
    )
    assert await engine.get_session(created.id) == created
    page = await engine.list_events(created.id, FIRST_PAGE, EVERY_EVENT)
    assert [event.value["content"] for event in page.items] == [MESSAGE["content"]]
    archived = await engine.archive_session(created.id)
    assert archived.status == "terminated"
    assert archived.session.archived_at is not None
    assert (await engine.get_item(ENV, created.item.id)).state == "stopped"
    assert (await engine.queue_stats(ENV)).stopped == 1
    assert await engine.archive_session(created.id) == archived
    assert await get_error_status_of_call(engine.send_events(created.id, [MESSAGE])) == 409


@pytest.mark.parametrize("session_id", ["sess_" + 32 * "0", "", "\0"])
async def test_unknown_session_is_not_found(engine: ControlPlaneEngine, session_id: str) -> None:
    assert await get_error_status_of_call(engine.get_session(session_id)) == 404
    assert await get_error_status_of_call(engine.send_events(session_id, [MESSAGE])) == 404
    assert await get_error_status_of_call(engine.archive_session(session_id)) == 404


async def test_scripted_session_continues_after_each_result(engine: ControlPlaneEngine) -> None:
    (item,) = await engine.enqueue(ENV, script=SCRIPT)
    page = await engine.list_events(item.session_id, FIRST_PAGE, EVERY_EVENT)
    (use,) = [event for event in page.items if event.type == "agent.tool_use"]
    result = {"type": "user.tool_result", "tool_use_id": use.id}
    assert len(await engine.send_events(item.session_id, [result])) == 1
    assert await get_error_status_of_call(engine.send_events(item.session_id, [result])) == 409
    types = [
        event.type
        for event in (await engine.list_events(item.session_id, FIRST_PAGE, EVERY_EVENT)).items
    ]
    assert types[-3:] == ["user.tool_result", "agent.message", "session.status_idle"]
    assert (await engine.get_session(item.session_id)).status == "idle"


async def test_event_list_is_filtered_by_type_and_position(engine: ControlPlaneEngine) -> None:
    (item,) = await engine.enqueue(ENV)
    sent = [(await engine.send_events(item.session_id, [MESSAGE]))[0] for _ in range(4)]
    await engine.emit_events(item.session_id, [{"type": "agent.thinking"}])
    wanted = EventFilter(types=frozenset({"user.message", "\0"}))
    page = await engine.list_events(item.session_id, ListPageRequest(3, "", None), wanted)
    assert (list(page.items), page.has_more) == (sent[:3], True)
    newest = wanted._replace(newest_first=True)
    page = await engine.list_events(item.session_id, ListPageRequest(2, "", None), newest)
    assert list(page.items) == [sent[3], sent[2]]
    page = await engine.list_events(item.session_id, ListPageRequest(2, "", sent[3].id), wanted)
    assert list(page.items) == [sent[1], sent[2]]


async def test_stream_returns_events_after_given_position(engine: ControlPlaneEngine) -> None:
    (item,) = await engine.enqueue(ENV)
    first, second = await engine.send_events(item.session_id, [MESSAGE, MESSAGE])
    assert await engine.count_events_to_skip(item.session_id, None) == 2
    assert await engine.count_events_to_skip(item.session_id, first.id) == 1
    assert await engine.count_events_to_skip(item.session_id, "evt_unknown") == 0
    assert await engine.wait_for_events(item.session_id, 1, 1.0) == [second]
    assert list(await engine.wait_for_events(item.session_id, 2, 0.01) or "x") == ["x"]
    async with asyncio.TaskGroup() as group:
        stream = group.create_task(engine.wait_for_events(item.session_id, 2, 999.0))
        # Give the stream time to begin its wait. The test also passes if the stream begins to wait
        # only after the event was sent.
        await asyncio.sleep(0.05)
        third = await engine.send_events(item.session_id, [MESSAGE])
    assert stream.result() == list(third)


async def test_list_and_stream_have_concurrently_sent_events_in_same_order(
    engine: ControlPlaneEngine,
) -> None:
    (item,) = await engine.enqueue(ENV)
    await asyncio.gather(*(engine.send_events(item.session_id, [MESSAGE]) for _ in range(12)))
    events = (await engine.list_events(item.session_id, FIRST_PAGE, EVERY_EVENT)).items
    assert len(events) == 12
    assert [event.id for event in events] == sorted(event.id for event in events)
    assert await engine.wait_for_events(item.session_id, 0, 1.0) == list(events)


async def test_message_to_session_with_stopped_item_creates_item(
    engine: ControlPlaneEngine,
) -> None:
    (item,) = await engine.enqueue(ENV)
    await engine.send_events(item.session_id, [MESSAGE], messages_bring_work=True)
    assert (await engine.get_session(item.session_id)).item.id == item.id
    await engine.stop_item(ENV, item.id, force=True)
    await engine.send_events(item.session_id, [MESSAGE], messages_bring_work=True)
    further = (await engine.get_session(item.session_id)).item
    assert further.id > item.id
    assert (await claim_item(engine)).id == further.id


async def test_session_list_is_filtered_and_ordered(engine: ControlPlaneEngine) -> None:
    first, second, third = [
        await engine.create_session(make_new_session(agent={"id": f"agent_{number}"}))
        for number in range(3)
    ]
    await engine.archive_session(second.id)
    newest = SessionFilter(archived=False, newest_first=True)
    page = await engine.list_sessions(FIRST_PAGE, newest)
    assert [view.id for view in page.items] == [third.id, first.id]
    page = await engine.list_sessions(ListPageRequest(1, "", None), SessionFilter())
    assert ([view.id for view in page.items], page.has_more) == ([first.id], True)
    page = await engine.list_sessions(
        ListPageRequest(2, first.id, None), SessionFilter(agent_id="agent_2")
    )
    assert [view.id for view in page.items] == [third.id]
    page = await engine.list_sessions(ListPageRequest(1, "", third.id), SessionFilter())
    assert [view.id for view in page.items] == [second.id]
