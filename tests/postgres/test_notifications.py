"""Tests of notifications that wake waiting calls on other nodes, even after a lost connection."""

from __future__ import annotations

import asyncio
import os
import signal
from contextlib import asynccontextmanager, suppress
from typing import TYPE_CHECKING, Any

import pytest

from workpool.server.postgres import notifications
from workpool.server.postgres.connection_pool import open_connection
from workpool.server.postgres.notifications import (
    NotificationHub,
    make_session_topic,
    make_work_topic,
)
from workpool.testing import in_virtual_time

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

    from tests.postgres.cluster import Cluster

SECONDS = 45.0
LONG = 600.0
WORK, SESSION = make_work_topic("env_1"), make_session_topic("sess_1")


@asynccontextmanager
async def run_notification_hubs(*hubs: NotificationHub) -> AsyncIterator[None]:
    async with asyncio.timeout(SECONDS), asyncio.TaskGroup() as group:
        tasks = [group.create_task(hub.run()) for hub in hubs]
        for hub in hubs:
            await hub.listening.wait()
        yield
        for task in tasks:
            task.cancel()


class TasksWaitingForChange:
    """Tasks that wait for a change of one topic, and the results of their waits."""

    def __init__(self, group: asyncio.TaskGroup, hub: NotificationHub, topic: str, n: int) -> None:
        self.ended: list[bool] = []
        self.tasks = [group.create_task(self._wait_for_topic_change(hub, topic)) for _ in range(n)]

    async def _wait_for_topic_change(self, hub: NotificationHub, topic: str) -> None:
        self.ended.append(await hub.wait_for_topic_change(topic, hub.get_change_count(), LONG))

    def cancel_all_tasks(self) -> None:
        for task in self.tasks:
            task.cancel()


async def wait_until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(SECONDS):
        while not condition():  # noqa: ASYNC110 - the loop brings it about
            await asyncio.sleep(0.005)


@pytest.fixture
def disable_fallback_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(notifications, "FALLBACK_SECONDS", LONG)


@pytest.fixture
def hubs(database_url: str) -> tuple[NotificationHub, NotificationHub]:
    return NotificationHub(database_url), NotificationHub(database_url)


@pytest.mark.usefixtures("disable_fallback_reads")
async def test_announced_items_wake_one_poll_per_item_on_each_node(
    hubs: tuple[NotificationHub, NotificationHub],
) -> None:
    async with run_notification_hubs(*hubs), asyncio.TaskGroup() as group:
        here, there = (TasksWaitingForChange(group, hub, WORK, 20) for hub in hubs)
        other = TasksWaitingForChange(group, hubs[1], make_work_topic("env_2"), 1)
        await asyncio.sleep(0)
        hubs[0].announce_topic_changes(WORK, 3)
        assert len(hubs[0]._waiting[WORK]) == 17
        await wait_until(lambda: len(there.ended) >= 3)
        # Notifications arrive in the order in which they were sent. Once the notification for the
        # topic of `env_2` has arrived, the one for the topic WORK has already woken its polls.
        hubs[0].announce_topic_changes(make_work_topic("env_2"))
        await wait_until(lambda: other.ended)
        assert (here.ended, there.ended) == ([True] * 3, [True] * 3)
        here.cancel_all_tasks()
        there.cancel_all_tasks()


@pytest.mark.usefixtures("disable_fallback_reads")
async def test_announced_event_wakes_all_streams_of_its_session(
    hubs: tuple[NotificationHub, NotificationHub],
) -> None:
    async with run_notification_hubs(*hubs), asyncio.TaskGroup() as group:
        waits = [TasksWaitingForChange(group, hub, SESSION, 3) for hub in hubs]
        await asyncio.sleep(0)
        hubs[0].announce_topic_changes(SESSION)
        await wait_until(lambda: all(len(each.ended) == 3 for each in waits))


@pytest.mark.usefixtures("disable_fallback_reads")
async def test_wait_for_topic_change_returns_at_once_if_topic_has_already_changed(
    hubs: tuple[NotificationHub, NotificationHub], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(notifications, "_TOPICS_MAX", 2)
    here, there = hubs
    async with run_notification_hubs(here, there):
        before, far = here.get_change_count(), there.get_change_count()
        here.announce_topic_changes(WORK)
        assert await here.wait_for_topic_change(WORK, before, LONG)
        assert not await here.wait_for_topic_change(SESSION, before, 0.01)
        await wait_until(lambda: there.get_change_count() > far)
        assert await there.wait_for_topic_change(WORK, far, LONG)
        # The hub remembers the last change of only two topics, so changes of three other topics
        # make it forget the change of the topic WORK. A wait for that change must end nevertheless.
        for number in range(3):
            here.announce_topic_changes(f"session:{number}")
        assert await here.wait_for_topic_change(WORK, before, LONG)
        assert not await here.wait_for_topic_change(WORK, here.get_change_count(), 0.01)


async def test_announcement_of_three_items_makes_three_of_twenty_polls_read_again(
    database_url: str,
) -> None:
    hub = NotificationHub(database_url)
    # Twenty polls read this change count, and then begin to read the table of items.
    seen = hub.get_change_count()
    hub.announce_topic_changes(WORK, 3)
    ended = [await hub.wait_for_topic_change(WORK, seen, 0.001) for _ in range(20)]
    assert ended == [True] * 3 + [False] * 17
    seen = hub.get_change_count()
    # A poll also calls `wake_waiting_calls` if its client has disconnected.
    hub.wake_waiting_calls(WORK)
    assert [await hub.wait_for_topic_change(WORK, seen, 0.001) for _ in range(2)] == [True, False]
    assert not await hub.wait_for_topic_change(WORK, hub.get_change_count(), 0.001)


@pytest.mark.usefixtures("disable_fallback_reads")
async def test_announcement_of_one_item_wakes_earlier_waiting_poll_but_not_later_poll(
    database_url: str,
) -> None:
    hub = NotificationHub(database_url)
    async with asyncio.timeout(SECONDS), asyncio.TaskGroup() as group:
        waiting = TasksWaitingForChange(group, hub, WORK, 1)
        await asyncio.sleep(0)
        seen = hub.get_change_count()
        hub.announce_topic_changes(WORK)
        assert not await hub.wait_for_topic_change(WORK, seen, 0.001)
        await wait_until(lambda: waiting.ended == [True])


@in_virtual_time
async def test_waiting_call_without_notification_reads_database_again_after_fallback_interval() -> (
    None
):
    hub = NotificationHub("postgresql://127.0.0.1/not-used")
    async with asyncio.TaskGroup() as group:
        polls, streams = (
            TasksWaitingForChange(group, hub, WORK, 3),
            TasksWaitingForChange(group, hub, SESSION, 3),
        )
        await asyncio.sleep(1.5 * notifications.FALLBACK_SECONDS)
        assert (polls.ended, streams.ended) == ([False], [False] * 3)
        # The first poll would now read the database, and wake the second poll if it found an item.
        # Here the test wakes the second poll. The wait of the third poll ends with the next
        # fallback interval.
        hub.wake_waiting_calls(WORK)
        await asyncio.sleep(0.1 * notifications.FALLBACK_SECONDS)
        assert polls.ended == [False, True]
        await asyncio.sleep(notifications.FALLBACK_SECONDS)
        assert polls.ended == [False, True, False]


@pytest.mark.usefixtures("disable_fallback_reads")
async def test_notification_hub_reconnects_and_wakes_waiting_calls_after_lost_connection(
    hubs: tuple[NotificationHub, NotificationHub], postgres: Cluster, database_url: str
) -> None:
    here, there = hubs
    async with run_notification_hubs(here, there), asyncio.TaskGroup() as group:
        polls, streams = (
            TasksWaitingForChange(group, there, WORK, 3),
            TasksWaitingForChange(group, there, SESSION, 3),
        )
        await asyncio.sleep(0)
        before = there.get_change_count()
        name = database_url.rpartition("/")[2]
        await asyncio.to_thread(
            postgres.execute,
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "  # noqa: S608 - our own name
            f"WHERE datname = '{name}' AND backend_type = 'client backend'",
        )
        # When the hub listens again, it wakes all streams: they may have missed a change.
        await wait_until(lambda: len(streams.ended) == 3)
        await wait_until(lambda: len(polls.ended) == 1)
        assert polls.ended == [False]
        assert await there.wait_for_topic_change("work:any", before, LONG)
        await here.listening.wait()
        here.announce_topic_changes(WORK, 2)
        await wait_until(lambda: len(polls.ended) == 3)


@pytest.mark.usefixtures("disable_fallback_reads")
async def test_notification_connection_that_answers_no_ping_is_replaced(
    hubs: tuple[NotificationHub, NotificationHub], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(notifications, "_PING_SECONDS", LONG)
    connections = []

    async def open_connection_with_short_limit(url: str) -> Any:
        connections.append(await open_connection(url, statement_seconds=0.2))
        return connections[-1]

    monkeypatch.setattr(notifications, "open_connection", open_connection_with_short_limit)
    hub = hubs[0]
    async with run_notification_hubs(hub), asyncio.TaskGroup() as group:
        streams = TasksWaitingForChange(group, hub, SESSION, 1)
        process = connections[-1].get_server_pid()
        os.kill(process, signal.SIGSTOP)  # the server is now silent, like behind a broken network
        # Send pings only now. A ping that was late before would have replaced the connection.
        monkeypatch.setattr(notifications, "_PING_SECONDS", 0.2)
        hub._wanted.set()  # makes the hub read the new interval; there is no notification to send
        try:
            await wait_until(lambda: streams.ended)
        finally:
            os.kill(process, signal.SIGCONT)


@pytest.mark.usefixtures("disable_fallback_reads")
async def test_topics_too_long_for_one_notification_are_sent_in_several_notifications(
    hubs: tuple[NotificationHub, NotificationHub],
) -> None:
    topics = [make_work_topic(f"env_{number:064}") for number in range(500)]
    async with run_notification_hubs(*hubs), asyncio.TaskGroup() as group:
        waits = [TasksWaitingForChange(group, hubs[1], topic, 1) for topic in topics]
        await asyncio.sleep(0)
        for topic in topics:
            hubs[0].announce_topic_changes(topic)
        await wait_until(lambda: all(each.ended == [True] for each in waits))


@pytest.mark.usefixtures("disable_fallback_reads")
async def test_too_many_unsent_notifications_wake_waiting_calls_of_every_topic(
    hubs: tuple[NotificationHub, NotificationHub], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(notifications, "_TOPICS_MAX", 10)
    async with run_notification_hubs(*hubs), asyncio.TaskGroup() as group:
        waits = TasksWaitingForChange(group, hubs[1], WORK, 1)
        await asyncio.sleep(0)
        for number in range(11):
            hubs[0].announce_topic_changes(make_session_topic(f"sess_{number}"))
        await wait_until(lambda: waits.ended == [False])


@pytest.mark.parametrize("payload", ["nonsense\nwithout a number", "other\n1 *", "x\n² work:"])
@pytest.mark.usefixtures("disable_fallback_reads")
async def test_unreadable_notification_makes_waiting_calls_read_database_again(
    hubs: tuple[NotificationHub, NotificationHub], database_url: str, payload: str
) -> None:
    async with run_notification_hubs(hubs[0]), asyncio.TaskGroup() as group:
        waits = TasksWaitingForChange(group, hubs[0], WORK, 1)
        await asyncio.sleep(0)
        connection = await open_connection(database_url)
        await connection.execute("SELECT pg_notify($1, $2)", notifications.CHANNEL, payload)
        await connection.close()
        await wait_until(lambda: waits.ended == [False])


@pytest.mark.usefixtures("disable_fallback_reads")
async def test_next_poll_wakes_if_woken_poll_is_cancelled(database_url: str) -> None:
    hub = NotificationHub(database_url)
    async with asyncio.timeout(SECONDS), asyncio.TaskGroup() as group:
        first, second = (TasksWaitingForChange(group, hub, WORK, 1) for _ in range(2))
        await asyncio.sleep(0)
        hub.announce_topic_changes(WORK)
        first.cancel_all_tasks()
        await wait_until(lambda: second.ended)
    assert first.ended == []


@pytest.mark.usefixtures("disable_fallback_reads")
async def test_method_end_waiting_calls_ends_current_waits_and_waits_that_begin_later(
    database_url: str,
) -> None:
    hub = NotificationHub(database_url)
    async with asyncio.timeout(SECONDS), asyncio.TaskGroup() as group:
        waits = [TasksWaitingForChange(group, hub, topic, 3) for topic in (WORK, SESSION)]
        await asyncio.sleep(0)
        hub.end_waiting_calls()
        await wait_until(lambda: all(len(each.ended) == 3 for each in waits))
        assert await hub.wait_for_topic_change(WORK, hub.get_change_count(), LONG)


async def test_notification_hub_started_without_database_connects_once_database_runs(
    dedicated_postgres: Cluster, caplog: pytest.LogCaptureFixture
) -> None:
    hub = NotificationHub(dedicated_postgres.url())
    dedicated_postgres.stop()
    async with asyncio.timeout(SECONDS), asyncio.TaskGroup() as group:
        task = group.create_task(hub.run())
        await wait_until(lambda: "notifications interrupted" in caplog.text)
        assert not await hub.wait_for_topic_change(WORK, hub.get_change_count(), 0.01)
        await asyncio.to_thread(dedicated_postgres.start)
        await hub.listening.wait()
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task
