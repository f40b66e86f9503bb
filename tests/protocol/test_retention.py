"""Retention: stopped items are deleted with their sessions and events, in memory and on disk."""

from __future__ import annotations

import asyncio
import sqlite3
from contextlib import closing
from typing import TYPE_CHECKING

import pytest

from tests.protocol.conftest import CLOUD, ENV, OTHER, TOKEN, ApiClient
from tests.protocol.test_events import events_path as path_of
from tests.protocol.test_stream import open_stream
from workpool.server import (
    APIError,
    ControlPlane,
    Item,
    Operations,
    Poll,
    PostgresStore,
    SqliteStore,
)
from workpool.server.retention import BATCH_MAX

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    import aiohttp

    from tests.manual_clock import ManualClock
    from workpool.server import Store

RETENTION_SECONDS = 100.0
"""Retention of stopped items in these tests, in seconds."""


def make_control_plane(
    store: Store, clock: ManualClock, retention: float | None = RETENTION_SECONDS
) -> ControlPlane:
    return ControlPlane(
        environments=(ENV, OTHER),
        cloud_environments=(CLOUD,),
        tokens={TOKEN: None},
        store=store,
        now=clock,
        retention=retention,
    )


@pytest.fixture
async def control_plane(clock: ManualClock, store: Store) -> AsyncIterator[ControlPlane]:
    if isinstance(store, PostgresStore):
        pytest.skip("sweeps delete on PostgreSQL: see tests/postgres/test_two_server_nodes.py")
    async with make_control_plane(store, clock) as plane:
        yield plane


def create_stopped_item(plane: ControlPlane) -> Item:
    (item,) = plane.enqueue(script=[{"name": "Bash"}])
    return plane.operations.stop_item(item.environment_id, item.id)


def count_database_rows(file: Path) -> list[int]:
    """Return the numbers of items, sessions and events in a database file."""
    with closing(sqlite3.connect(file)) as connection:
        return [
            connection.execute(f"SELECT count(*) FROM {table}").fetchone()[0]  # noqa: S608 - fixed names
            for table in ("work", "session", "event")
        ]


@pytest.mark.usefixtures("memory_and_sqlite_stores")
async def test_stopped_item_is_deleted_with_session_after_retention(
    api: ApiClient, clock: ManualClock
) -> None:
    item = create_stopped_item(api.plane)
    (waiting,) = api.plane.enqueue()
    clock.advance(RETENTION_SECONDS - 1)
    await api.poll()
    assert await api.item_state(item.id) == "stopped"
    clock.advance(1)
    await api.poll()
    assert (await api.get(item.id)).status == 404
    for suffix in ("", "/events", "/events/stream"):
        assert (await api("GET", path_of(api, item.session_id, suffix))).status == 404
    listed = (await api("GET", api.work_url())).body["data"]
    assert [each["id"] for each in listed] == [waiting.id]
    assert await api.item_state(waiting.id) == "queued"


async def test_deleted_items_are_removed_from_database_file(
    tmp_path: Path, clock: ManualClock, http_session: aiohttp.ClientSession
) -> None:
    file = tmp_path / "work.db"
    async with make_control_plane(SqliteStore(file), clock) as plane:
        create_stopped_item(plane)
        plane.enqueue()
        clock.advance(RETENTION_SECONDS)
        await ApiClient(plane, http_session, "qoder").poll()
    assert count_database_rows(file) == [1, 1, 0]


async def test_server_start_deletes_items_whose_retention_ended_while_server_was_down(
    tmp_path: Path, clock: ManualClock
) -> None:
    file = tmp_path / "work.db"
    async with make_control_plane(SqliteStore(file), clock) as plane:
        # The next server does not serve the environment `OTHER`, but must also delete the stopped
        # item of this environment.
        (former,) = plane.enqueue(environment_id=OTHER)
        plane.operations.stop_item(OTHER, former.id)
        old = create_stopped_item(plane)
        clock.advance(RETENTION_SECONDS / 2)
        young = create_stopped_item(plane)
    clock.advance(RETENTION_SECONDS / 2)
    serves_one = ControlPlane(
        environments=(ENV,), store=SqliteStore(file), now=clock, retention=RETENTION_SECONDS
    )
    async with serves_one as plane:
        with pytest.raises(APIError):
            plane.operations.get_item(ENV, old.id)
        assert plane.operations.get_item(ENV, young.id).state == "stopped"
        clock.advance(RETENTION_SECONDS / 2)
        plane.operations.poll(ENV, Poll())
        assert len(plane.operations.get_queue(ENV)) == 0
        (new,) = plane.enqueue()
        assert new.id > young.id
    assert count_database_rows(file) == [1, 1, 0]


async def test_session_is_deleted_when_retention_of_its_last_item_ends(
    control_plane: ControlPlane, clock: ManualClock
) -> None:
    operations = control_plane.operations
    (first,) = control_plane.enqueue()
    second, third = (control_plane.enqueue(session_id=first.session_id)[0] for _ in range(2))
    # The retention of the newest item ends first. The control plane must nevertheless keep the
    # session and all three items until the retention of the last item has ended.
    operations.stop_item(ENV, third.id)
    clock.advance(RETENTION_SECONDS)
    operations.poll(ENV, Poll())
    operations.stop_item(ENV, first.id, force=True)
    clock.advance(RETENTION_SECONDS)
    operations.poll(ENV, Poll())
    operations.stop_item(ENV, second.id, force=True)
    clock.advance(RETENTION_SECONDS - 1)
    operations.poll(ENV, Poll())
    assert operations.get_session(first.session_id)[1].id == third.id
    clock.advance(1)
    operations.poll(ENV, Poll())
    with pytest.raises(APIError):
        operations.get_session(first.session_id)
    assert len(operations.get_queue(ENV)) == 0


async def test_item_stopped_by_expired_lease_is_deleted_after_retention(
    qoder_api: ApiClient, clock: ManualClock
) -> None:
    work_id = await qoder_api.create_item_in_state("stopping")
    clock.advance(60)
    assert await qoder_api.item_state(work_id) == "stopped"
    clock.advance(RETENTION_SECONDS)
    await qoder_api.poll()
    assert (await qoder_api.get(work_id)).status == 404


async def test_stream_of_deleted_session_ends(qoder_api: ApiClient, clock: ManualClock) -> None:
    item = create_stopped_item(qoder_api.plane)
    async with open_stream(qoder_api, item.session_id) as reader:
        clock.advance(RETENTION_SECONDS)
        await qoder_api.poll()
        async with asyncio.timeout(20):
            assert await reader.response.content.read() == b""


async def test_one_poll_deletes_limited_number_of_items_whose_retention_ended(
    control_plane: ControlPlane, clock: ManualClock
) -> None:
    operations = control_plane.operations
    for item in control_plane.enqueue(2 * BATCH_MAX + 1):
        operations.stop_item(ENV, item.id)
    clock.advance(RETENTION_SECONDS)
    sizes = []
    for _ in range(3):
        operations.poll(ENV, Poll())
        sizes.append(len(operations.get_queue(ENV)))
    assert sizes == [BATCH_MAX + 1, 1, 0]


async def test_items_are_kept_forever_by_default(clock: ManualClock) -> None:
    operations = Operations([ENV], now=clock)
    (item,) = operations.enqueue(ENV)
    operations.stop_item(ENV, item.id)
    clock.advance(1e9)
    operations.poll(ENV, Poll())
    assert operations.get_item(ENV, item.id).state == "stopped"


async def test_paging_over_sessions_skips_deleted_sessions(
    control_plane: ControlPlane, clock: ManualClock
) -> None:
    ended = create_stopped_item(control_plane)
    (going_on,) = control_plane.enqueue()
    clock.advance(RETENTION_SECONDS)
    control_plane.operations.poll(ENV, Poll())
    found = [session.id for session, _ in control_plane.operations.iterate_sessions()]
    assert found == [going_on.session_id]
    assert ended.session_id not in found
