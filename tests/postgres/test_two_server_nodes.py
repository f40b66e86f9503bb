"""Two nodes on one database: no item has two owners, and each node sees the other's commits."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import pytest

from workpool.server import APIError, ControlPlane, Poll, PostgresStore, summarize
from workpool.server.conversation import EVERY_EVENT
from workpool.server.parsing.creation_requests import NewEnvironment
from workpool.server.parsing.request_values import ListPageRequest
from workpool.server.postgres import connection_pool, database_calls, retention_calls
from workpool.server.state_machine import last_heartbeat

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from tests.postgres.cluster import Cluster
    from workpool.server.engine import ControlPlaneEngine

ENV = "env_0199aaaaaaaa70008000000000000001"
MESSAGE = {"type": "user.message", "content": [{"type": "text", "text": "hello"}]}
SECONDS = 60


def client_is_never_disconnected() -> bool:
    return False


@pytest.fixture
async def nodes(database_url: str) -> AsyncIterator[list[ControlPlaneEngine]]:
    store = PostgresStore(database_url, history=True)
    nodes = [ControlPlane(environments=(ENV,), store=store).engine for _ in range(2)]
    try:
        await asyncio.gather(*(node.open() for node in nodes))
        async with asyncio.timeout(SECONDS):
            yield nodes
    finally:
        for node in nodes:
            node.end_waiting_calls()
            await node.close()


async def gather_results_and_error_statuses(*calls: Any) -> list[Any]:
    """Run calls concurrently, and return the result of each, or the status of its APIError."""
    found = await asyncio.gather(*calls, return_exceptions=True)
    for each in found:
        if isinstance(each, BaseException) and not isinstance(each, APIError):
            raise each
    return [each.status if isinstance(each, APIError) else each for each in found]


async def test_nodes_share_signing_key_and_environments(nodes: list[ControlPlaneEngine]) -> None:
    one, other = nodes
    assert one.signing_key == other.signing_key
    created = await one.create_environment(NewEnvironment("name", None, {}))
    await other.require_self_hosted_environment(created.id)
    assert await other.get_environment(created.id) == created


async def test_concurrent_polls_of_two_nodes_deliver_each_item_once(
    nodes: list[ControlPlaneEngine],
) -> None:
    items = await nodes[0].enqueue(ENV, count=60)
    polls = [
        node.long_poll(ENV, Poll("w", 20_000), client_is_never_disconnected)
        for node in nodes
        for _ in range(30)
    ]
    found = await asyncio.gather(*polls)
    assert sorted(item.id for item in found if item) == [item.id for item in items]


async def test_waiting_poll_gets_item_that_other_node_creates(
    nodes: list[ControlPlaneEngine],
) -> None:
    one, other = nodes
    async with asyncio.TaskGroup() as group:
        poll = group.create_task(
            one.long_poll(ENV, Poll("w", 999_000), client_is_never_disconnected)
        )
        # Give the poll time to begin its wait. If it begins later, it must also get the item.
        await asyncio.sleep(0.1)
        (item,) = await other.enqueue(ENV)
    assert (found := poll.result()) is not None
    assert found.id == item.id


async def test_stream_gets_event_that_other_node_appends(nodes: list[ControlPlaneEngine]) -> None:
    one, other = nodes
    (item,) = await one.enqueue(ENV)
    async with asyncio.TaskGroup() as group:
        stream = group.create_task(one.wait_for_events(item.session_id, 0, 999.0))
        # Give the stream time to begin its wait. If it begins later, it must also get the event.
        await asyncio.sleep(0.1)
        sent = await other.send_events(item.session_id, [MESSAGE])
    assert stream.result() == list(sent)


async def test_poll_that_is_cancelled_leaves_item_undelivered_in_queue(
    nodes: list[ControlPlaneEngine],
) -> None:
    for _ in range(20):
        await nodes[0].enqueue(ENV)
        async with asyncio.TaskGroup() as group:
            poll = group.create_task(
                nodes[0].long_poll(ENV, Poll("w"), client_is_never_disconnected)
            )
            await asyncio.sleep(0.002)  # now the poll is usually claiming the item
            poll.cancel()
        stats = await nodes[1].queue_stats(ENV)
        if poll.cancelled():
            assert (stats.depth, stats.pending) == (1, 0)
        (item,) = (await nodes[1].list_items(ENV, ListPageRequest(100, "", None))).items[-1:]
        await nodes[1].stop_item(ENV, item.id, force=True)


async def test_concurrent_heartbeats_to_two_nodes_extend_the_lease_once(
    nodes: list[ControlPlaneEngine],
) -> None:
    (item,) = await nodes[0].enqueue(ENV)
    await nodes[0].long_poll(ENV, Poll("w"), client_is_never_disconnected)
    await nodes[1].ack_item(ENV, item.id, "w")
    first = await nodes[0].heartbeat(ENV, item.id, "NO_HEARTBEAT", 60, "w")
    for _ in range(10):
        expected = last_heartbeat(first)
        calls = [node.heartbeat(ENV, item.id, expected, 60, "w") for node in nodes]
        found = await gather_results_and_error_statuses(*calls)
        assert found.count(412) == 1
        (first,) = [each for each in found if each != 412]


async def test_node_applies_calls_to_current_row_if_its_cached_row_is_outdated(
    nodes: list[ControlPlaneEngine],
) -> None:
    one, other = nodes
    (item,) = await one.enqueue(ENV)
    # With this poll, the node has the row in its cache.
    await one.long_poll(ENV, Poll("w"), client_is_never_disconnected)
    await other.ack_item(ENV, item.id, "w")
    beaten = await other.heartbeat(ENV, item.id, "NO_HEARTBEAT", 60, "w")
    assert await one.ack_item(ENV, item.id, "w") == beaten
    assert (
        await one.update_metadata(ENV, item.id, {"k": "v"}, "w")
    ).heartbeat_at == beaten.heartbeat_at
    assert (await other.stop_item(ENV, item.id, "w")).state == "stopping"
    stopped = await one.stop_item(ENV, item.id, "w", force=True)
    assert (stopped.state, stopped.metadata) == ("stopped", {"k": "v"})
    assert await other.get_item(ENV, item.id) == stopped
    kinds = [record.kind for record in await one.read_history()]
    assert kinds[-4:] == ["heartbeat", "metadata", "stop_requested", "stopped"]


async def test_ack_at_node_with_outdated_cached_row_after_failover_is_409(
    nodes: list[ControlPlaneEngine], postgres: Cluster, database_url: str
) -> None:
    one, other = nodes
    (item,) = await one.enqueue(ENV)
    await one.long_poll(ENV, Poll("a"), client_is_never_disconnected)
    # Undo the delivery, as a failover to a standby without the last commit would.
    postgres.execute(
        "UPDATE items SET version = 1, delivered_at = NULL, holder = NULL", database_url
    )
    await other.long_poll(ENV, Poll("b"), client_is_never_disconnected)
    assert await gather_results_and_error_statuses(one.ack_item(ENV, item.id, "a")) == [409]
    assert (await other.ack_item(ENV, item.id, "b")).holder == "b"


COLLIDING_RECORDS = """
CREATE SEQUENCE attempts;  -- a rollback does not reset a sequence
CREATE FUNCTION collide_twice() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    IF nextval('attempts') < 3 THEN RAISE SQLSTATE '40001'; END IF;
    RETURN NEW;
END $$;
CREATE TRIGGER collide BEFORE INSERT ON history
    FOR EACH ROW WHEN (NEW.kind = 'conflict') EXECUTE FUNCTION collide_twice();
"""


@pytest.mark.parametrize("attempts_without_lock", [0, 3])
async def test_conflict_is_409_and_recorded_once_with_a_single_connection_and_collisions(
    database_url: str,
    postgres: Cluster,
    monkeypatch: pytest.MonkeyPatch,
    attempts_without_lock: int,
) -> None:
    monkeypatch.setattr(database_calls, "_ATTEMPTS", attempts_without_lock)
    monkeypatch.setattr(connection_pool, "POOL_SIZE", 1)
    store = PostgresStore(database_url, history=True)
    node = ControlPlane(environments=(ENV,), store=store).engine
    try:
        await node.open()
        await asyncio.to_thread(postgres.execute, COLLIDING_RECORDS, database_url)
        async with asyncio.timeout(SECONDS):
            (item,) = await node.enqueue(ENV)
            await node.stop_item(ENV, item.id, force=True)
            with pytest.raises(APIError) as caught:
                await node.ack_item(ENV, item.id, "w")
            assert caught.value.status == 409
            conflicts = [each for each in await node.read_history() if each.kind == "conflict"]
    finally:
        node.end_waiting_calls()
        await node.close()
    assert [(each.work_id, each.worker_id, each.state, each.op) for each in conflicts] == [
        (item.id, "w", "stopped", "ack")
    ]


async def test_item_with_concurrent_acks_and_stop_never_has_two_holders(
    nodes: list[ControlPlaneEngine],
) -> None:
    for item in await nodes[0].enqueue(ENV, count=10):
        await nodes[0].long_poll(ENV, Poll("a", 0, 0), client_is_never_disconnected)
        await gather_results_and_error_statuses(
            nodes[0].ack_item(ENV, item.id, "a"),
            nodes[1].ack_item(ENV, item.id, "b"),
            nodes[1].long_poll(ENV, Poll("b", 0, 0), client_is_never_disconnected),
            nodes[0].stop_item(ENV, item.id, force=True),  # an operator's stop has no worker id
        )
        await nodes[1].stop_item(ENV, item.id, force=True)
    summary = summarize(await nodes[0].read_history())
    assert (summary.stopped, summary.lost, summary.overlapping) == (10, 0, 0)
    assert (await nodes[1].queue_stats(ENV)).stopped == 10


async def test_events_sent_to_two_nodes_have_the_same_order_on_both(
    nodes: list[ControlPlaneEngine],
) -> None:
    (item,) = await nodes[0].enqueue(ENV)
    await asyncio.gather(
        *(node.send_events(item.session_id, [MESSAGE, MESSAGE]) for node in nodes for _ in range(8))
    )
    lists = [
        await node.list_events(item.session_id, ListPageRequest(99, "", None), EVERY_EVENT)
        for node in nodes
    ]
    ids = [event.id for event in lists[0].items]
    assert ids == [event.id for event in lists[1].items]
    assert ids == sorted(set(ids))
    assert len(ids) == 32


async def test_concurrent_messages_to_stopped_session_create_one_item(
    nodes: list[ControlPlaneEngine],
) -> None:
    (item,) = await nodes[0].enqueue(ENV)
    await nodes[0].stop_item(ENV, item.id, force=True)
    calls = [
        node.send_events(item.session_id, [MESSAGE], messages_bring_work=True) for node in nodes
    ]
    assert len(await asyncio.gather(*calls)) == 2
    assert (await nodes[0].queue_stats(ENV)).depth == 1


async def test_termination_is_last_event_of_session_archived_during_concurrent_sends(
    nodes: list[ControlPlaneEngine],
) -> None:
    (item,) = await nodes[0].enqueue(ENV)
    await gather_results_and_error_statuses(
        *(node.send_events(item.session_id, [MESSAGE]) for node in nodes for _ in range(4)),
        nodes[1].archive_session(item.session_id),
        nodes[0].archive_session(item.session_id),
    )
    events = await nodes[0].list_events(item.session_id, ListPageRequest(99, "", None), EVERY_EVENT)
    types = [event.type for event in events.items]
    assert types.count("session.status_terminated") == 1
    assert types[-1] == "session.status_terminated"
    assert (await nodes[1].get_item(ENV, item.id)).state == "stopped"


async def test_deletion_of_ended_sessions_spares_session_that_gets_new_message(
    nodes: list[ControlPlaneEngine],
) -> None:
    items = await nodes[0].enqueue(ENV, count=8)
    for item in items:
        await nodes[0].stop_item(ENV, item.id, force=True)
    engine: Any = nodes[1]
    found = await gather_results_and_error_statuses(
        engine.delete_ended_sessions(0),
        *(
            nodes[0].send_events(item.session_id, [MESSAGE], messages_bring_work=True)
            for item in items
        ),
    )
    deleted, refused = found[0], found[1:].count(404)
    assert deleted == refused
    stats = await nodes[0].queue_stats(ENV)
    assert (stats.depth, stats.stopped) == (8 - deleted, 8 - deleted)


async def test_deletion_of_sessions_with_many_events_takes_several_batches(
    nodes: list[ControlPlaneEngine], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(retention_calls, "EVENTS_MAX", 3)
    for item in await nodes[0].enqueue(ENV, count=3):
        await nodes[0].send_events(item.session_id, [MESSAGE, MESSAGE])
        await nodes[0].stop_item(ENV, item.id, force=True)
    engine: Any = nodes[1]
    assert [await engine.delete_ended_sessions(0) for _ in range(4)] == [1, 1, 1, 0]
    assert (await nodes[0].queue_stats(ENV)).stopped == 0
