"""The SQLite store: changes of answered requests survive, and files of other origin are refused."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sqlite3
import sys
import threading
import time
from contextlib import asynccontextmanager, closing
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import aiohttp
import pytest

from tests.protocol.conftest import ENV, OTHER, TOKEN, ApiClient
from workpool.server import ControlPlane, Item, SqliteStore, StoreError
from workpool.server.conversation import StoredEvent
from workpool.server.stored_session import StoredSession
from workpool.server.stores.sqlite import SCHEMA_VERSION

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from tests.manual_clock import ManualClock


@pytest.fixture
def database_path(tmp_path: Path) -> Path:
    return tmp_path / "work.db"


def control_plane_with_database(path: Path, clock: ManualClock, *environments: str) -> ControlPlane:
    return ControlPlane(
        environments=environments or (ENV,),
        tokens={TOKEN: None},
        store=SqliteStore(path),
        now=clock,
    )


async def test_items_sessions_and_stats_survive_restart(
    database_path: Path, clock: ManualClock, http_session: aiohttp.ClientSession
) -> None:
    async with control_plane_with_database(database_path, clock, ENV, OTHER) as plane:
        api = ApiClient(plane, http_session, "qoder")
        for state in ("stopped", "stopping", "active", "starting", "queued"):
            await api.create_item_in_state(state, "a")
        plane.enqueue(metadata={"nul": "\0", "emoji": "🙂"}, environment_id=OTHER)
        assert (await api.claim_item(worker="a"))["state"] == "queued"
        sessions = [
            (await api("GET", f"{api.base_url}/sessions/{item['data']['id']}")).body
            for item in (await api("GET", api.work_url())).body["data"]
        ]
        before = [(await api("GET", api.work_url("", env))).body for env in (ENV, OTHER)]
        stats = await api.queue_stats()
    async with control_plane_with_database(database_path, clock, ENV, OTHER) as plane:
        api = ApiClient(plane, http_session, "qoder")
        assert [(await api("GET", api.work_url("", env))).body for env in (ENV, OTHER)] == before
        assert (await api.queue_stats()) == {**stats, "workers_polling": 0}
        for session in sessions:
            url = f"{api.base_url}/sessions/{session['id']}"
            assert (await api("GET", url)).body == session
        _, stopping, active, starting, queued = (item["id"] for item in before[0]["data"])
        # Worker `a` received this item before the restart, so the server refuses the ack of `b`.
        assert (await api.ack(queued, worker="b")).status == 409
        assert (await api.heartbeat(active, "NO_HEARTBEAT")).status == 412
        assert (await api.heartbeat(starting, "NO_HEARTBEAT")).status == 200
        clock.advance(60)
        states = [await api.item_state(work_id) for work_id in (queued, stopping, active, starting)]
        assert states == ["queued", "stopped", "queued", "queued"]
        (newer,) = plane.enqueue()
        assert newer.id > max(item["id"] for item in before[0]["data"])


async def test_item_is_still_leased_to_same_worker_after_restart_of_control_plane(
    database_path: Path, clock: ManualClock, http_session: aiohttp.ClientSession
) -> None:
    async with control_plane_with_database(database_path, clock) as plane:
        api = ApiClient(plane, http_session, "qoder")
        starting, active = [
            await api.create_item_in_state(state, "a") for state in ("starting", "active")
        ]
    async with control_plane_with_database(database_path, clock) as plane:
        api = ApiClient(plane, http_session, "qoder")
        for work_id in (starting, active):
            assert (await api.ack(work_id, worker="b")).status == 409
            assert (await api.ack(work_id, worker="a")).status == 200


async def test_ids_ascend_across_restart_with_clock_set_back(
    database_path: Path, clock: ManualClock
) -> None:
    async with control_plane_with_database(database_path, clock) as plane:
        (former,) = plane.enqueue()
    clock.advance(-86_400)
    async with control_plane_with_database(database_path, clock) as plane:
        assert plane.enqueue()[0].id > former.id


async def test_order_of_redeliveries_survives_restart(
    database_path: Path, clock: ManualClock, http_session: aiohttp.ClientSession
) -> None:
    async with control_plane_with_database(database_path, clock) as plane:
        api = ApiClient(plane, http_session, "qoder")
        first, second = (item.id for item in plane.enqueue(2))
        await api.claim_item()
        await api.claim_item()
        clock.advance(5)
        # Deliver the first item again, so that only the second one is due after the restart.
        assert (await api.claim_item())["id"] == first
    async with control_plane_with_database(database_path, clock) as plane:
        api = ApiClient(plane, http_session, "qoder")
        assert (await api.claim_item())["id"] == second
        assert (await api.poll()).body is None
        clock.advance(5)
        assert (await api.claim_item())["id"] == first


async def test_items_survive_server_run_that_lacks_their_environment(
    database_path: Path, clock: ManualClock
) -> None:
    async with control_plane_with_database(database_path, clock, ENV, OTHER) as plane:
        plane.enqueue(environment_id=OTHER)
    async with control_plane_with_database(database_path, clock, ENV):
        pass
    async with control_plane_with_database(database_path, clock, ENV, OTHER) as plane:
        assert len(plane.operations.get_queue(OTHER)) == 1


async def test_every_stored_field_is_read_back(database_path: Path) -> None:
    number = dict.fromkeys(
        ("acknowledged_at", "started_at", "heartbeat_at", "stop_requested_at", "stopped_at"), 1
    )
    item = Item(
        id="work_1",
        environment_id=ENV,
        session_id="sess_1",
        created_at=2,
        type="healthcheck",
        state="stopping",
        metadata={"k": "v"},
        holder="w",
        delivered_at=3,
        lease_end=4,
        ttl_seconds=5,
        beaten=True,
        **number,
    )
    script = [{"name": "Bash", "input": {}, "custom": False, "permission": "allow"}]
    sessions = [
        StoredSession("sess_1", ENV, {"k": "v"}, 7),
        StoredSession("sess_2", ENV, {}, 8, script),
        StoredSession("sess_3", ENV, {}, 9, []),
    ]
    value = {"id": "evt_0", "type": "x", "processed_at": "2026-03-01T12:00:00Z"}
    events = [StoredEvent(f"evt_{number}", "sess_2", {**value, "n": number}) for number in range(3)]
    store = SqliteStore(database_path)
    await store.open()
    for session in sessions:
        store.save_session(session)
    store.save_events(events)
    store.save_item(item)
    store.save_item(replace(item, ttl_seconds=6))
    await store.wait_until_durable()
    await store.close()
    store = SqliteStore(database_path)
    contents = await store.open()
    await store.close()
    assert contents.items == [replace(item, ttl_seconds=6)]
    assert contents.sessions == sessions
    assert contents.events == events


async def test_database_with_newer_schema_is_refused(
    database_path: Path, clock: ManualClock
) -> None:
    async with control_plane_with_database(database_path, clock):
        pass
    with closing(sqlite3.connect(database_path)) as connection:
        assert connection.execute("PRAGMA user_version").fetchone() == (SCHEMA_VERSION,)
        connection.execute(f"PRAGMA user_version = {SCHEMA_VERSION + 1}")
    with pytest.raises(StoreError, match="newer workpool"):
        await control_plane_with_database(database_path, clock).__aenter__()


async def test_database_of_another_program_is_refused(
    database_path: Path, clock: ManualClock
) -> None:
    with closing(sqlite3.connect(database_path)) as connection:
        connection.execute("CREATE TABLE theirs (x)")
    with pytest.raises(StoreError, match="not a database of workpool"):
        await control_plane_with_database(database_path, clock).__aenter__()


def test_file_that_is_no_database_is_refused(database_path: Path, clock: ManualClock) -> None:
    database_path.write_text("not a database, and long enough to be read as one" * 100)
    with pytest.raises(StoreError, match="not a database"), asyncio.Runner() as runner:
        runner.run(control_plane_with_database(database_path, clock).__aenter__())
    assert database_path.read_text().startswith("not a database")


async def test_store_in_missing_directory_is_refused(tmp_path: Path, clock: ManualClock) -> None:
    with pytest.raises(StoreError, match="unable to open"):
        await control_plane_with_database(tmp_path / "missing" / "work.db", clock).__aenter__()


async def test_second_server_with_same_database_file_is_refused(
    database_path: Path, clock: ManualClock
) -> None:
    async with control_plane_with_database(database_path, clock):
        with pytest.raises(StoreError, match="locked"):
            await control_plane_with_database(database_path, clock).__aenter__()


@pytest.mark.parametrize("mask", [0o000, 0o022, 0o077])
def test_files_of_new_store_are_accessible_only_to_owner(database_path: Path, mask: int) -> None:
    former = os.umask(mask)
    try:
        with closing(SqliteStore(database_path)._connect()) as connection:
            connection.execute("BEGIN IMMEDIATE")
            connection.execute("CREATE TABLE more (x)")
            connection.execute("COMMIT")
            modes = {
                each.name: each.stat().st_mode & 0o777 for each in database_path.parent.iterdir()
            }
    finally:
        os.umask(former)
    assert modes == {"work.db": 0o600, "work.db-wal": 0o600}


ROW_CHANGES = {
    "work.metadata": "UPDATE work SET metadata = 'not json'",
    "work.metadata of lists": """UPDATE work SET metadata = '{"k": []}'""",
    "work.metadata as bytes": "UPDATE work SET metadata = x'00'",
    "work.created_at": "UPDATE work SET created_at = 'yesterday'",
    "work.stopped_at": "UPDATE work SET stopped_at = 9000000000000000000",
    "work.beaten": "UPDATE work SET beaten = 2",
    "work.holder": "UPDATE work SET holder = x'ff'",
    "session.script": "UPDATE session SET script = '[1]'",
    "event.value": "UPDATE event SET value = '[]'",
    "event.value without a time": """UPDATE event SET value = '{"id": "a", "type": "b"}'""",
}


async def create_item_with_event_in_database(path: Path, clock: ManualClock) -> None:
    async with control_plane_with_database(path, clock) as plane:
        (item,) = plane.enqueue(script=[{"name": "Bash"}])
        plane.emit(item.session_id, {"type": "agent.message", "content": []})


@pytest.mark.parametrize("name", ROW_CHANGES)
async def test_malformed_row_prevents_start_and_is_named_in_error(
    database_path: Path, clock: ManualClock, name: str
) -> None:
    await create_item_with_event_in_database(database_path, clock)
    with closing(sqlite3.connect(database_path)) as connection:
        connection.execute(ROW_CHANGES[name])
        connection.commit()
    column = name.split(maxsplit=1)[0].rpartition(".")[2]
    async with asyncio.timeout(20):
        with pytest.raises(StoreError, match=rf"work\.db: the row '\w+_\w+' .* {column} is malf"):
            await control_plane_with_database(database_path, clock).__aenter__()


@pytest.mark.parametrize(
    "change",
    [
        "DELETE FROM session",
        "UPDATE event SET session_id = 'sess_0'",
        "UPDATE work SET id = 'work_nothex'",
    ],
)
async def test_contradictory_rows_in_database_prevent_start_of_control_plane(
    database_path: Path, clock: ManualClock, change: str
) -> None:
    await create_item_with_event_in_database(database_path, clock)
    with closing(sqlite3.connect(database_path)) as connection:
        connection.execute(change)
        connection.commit()
    async with asyncio.timeout(20):
        with pytest.raises(StoreError, match="do not fit together"):
            await control_plane_with_database(database_path, clock).__aenter__()


async def test_sqlite_store_fails_after_an_exception_on_its_writer_thread(
    database_path: Path, clock: ManualClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with control_plane_with_database(database_path, clock) as plane:
        monkeypatch.setattr("workpool.server.stores.sqlite._write_rows", lambda *_: 1 / 0)
        plane.enqueue()
        async with asyncio.timeout(20):
            with pytest.raises(StoreError, match="ZeroDivisionError"):
                await plane.operations.wait_until_durable()


async def test_close_of_sqlite_store_ends_a_read_in_progress(
    database_path: Path, clock: ManualClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with control_plane_with_database(database_path, clock) as plane:
        plane.enqueue(10)
    store = SqliteStore(database_path)
    reading = threading.Event()
    rows: list[object] = []

    def read_until_connection_closes(_: object, row: object) -> None:
        rows.append(row)
        reading.set()
        deadline = time.monotonic() + 20
        while not store._closing and time.monotonic() < deadline:
            time.sleep(0.001)

    monkeypatch.setattr(
        "workpool.server.stores.sqlite_rows.RowTable.decode_row", read_until_connection_closes
    )
    async with asyncio.timeout(20), asyncio.TaskGroup() as group:
        opening = group.create_task(store.open())
        assert await asyncio.to_thread(reading.wait, 20)
        opening.cancel()
        await store.close()
    assert len(rows) == 1


def test_database_uses_wal_and_full_sync(database_path: Path) -> None:
    with closing(SqliteStore(database_path)._connect()) as connection:
        assert connection.execute("PRAGMA journal_mode").fetchone() == ("wal",)
        full = 2
        assert connection.execute("PRAGMA synchronous").fetchone() == (full,)


async def test_every_call_after_failure_of_store_is_answered_with_500(
    database_path: Path,
    clock: ManualClock,
    http_session: aiohttp.ClientSession,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def raise_disk_full_error(*_: object) -> None:
        raise sqlite3.OperationalError("database or disk is full")

    async with control_plane_with_database(database_path, clock) as plane:
        api = ApiClient(plane, http_session, "qoder")
        (kept,) = (await api("POST", api.work_url())).body["data"]
        monkeypatch.setattr("workpool.server.stores.sqlite._write_rows", raise_disk_full_error)
        answer = await api("POST", api.work_url())
        assert answer.status == 500
        assert answer.error["type"] == "api_error"
        assert (await api.get(kept["id"])).status == 500
    monkeypatch.undo()
    async with control_plane_with_database(database_path, clock) as plane:
        api = ApiClient(plane, http_session, "qoder")
        assert await api.item_state(kept["id"]) == "queued"
        assert len(plane.operations.get_queue(ENV)) == 1


STATE_ORDER = ["queued", "starting", "active", "stopped"]


@asynccontextmanager
async def start_server(path: Path) -> AsyncIterator[tuple[asyncio.subprocess.Process, int]]:
    script = Path(__file__).with_name("sqlite_control_plane.py")
    process = await asyncio.create_subprocess_exec(
        sys.executable, str(script), str(path), stdout=asyncio.subprocess.PIPE
    )
    try:
        assert process.stdout is not None
        async with asyncio.timeout(40):
            yield process, int(await process.stdout.readline())
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await process.communicate()


class AnswerRecordingWorkers:
    """Workers that claim, update and stop items, and record every answer."""

    def __init__(self, http: aiohttp.ClientSession, port: int) -> None:
        self._http = http
        self._url = f"http://127.0.0.1:{port}/api/v1/cloud/environments/{ENV}/work"
        self.answers = 0
        self.known: dict[str, dict[str, Any]] = {}
        self.enough = asyncio.Event()

    async def send_request(self, method: str, suffix: str, **options: Any) -> Any:
        headers = {"Authorization": f"Bearer {TOKEN}"}
        url = self._url + suffix
        async with self._http.request(method, url, headers=headers, **options) as response:
            assert response.status == 200
            body = await response.json()
        self.answers += 1
        if self.answers >= 400:
            self.enough.set()
        return body

    async def run_items_until_server_is_killed(self) -> None:
        """Create and run one item after another until the server is killed."""
        while True:
            try:
                await self.create_and_run_one_item()
            except (aiohttp.ClientError, ConnectionError):
                return

    async def create_and_run_one_item(self) -> None:
        (item,) = (await self.send_request("POST", "", json={"count": 1}))["data"]
        self.known[item["id"]] = item
        polled = await self.send_request("GET", "/poll")
        for call in ("/ack", "/heartbeat", "", "/stop"):
            json = {"": {"metadata": {"k": "v"}}, "/stop": {"force": True}}.get(call)
            answer = await self.send_request("POST", f"/{polled['id']}{call}", json=json)
            if answer["type"] == "work":
                self.known[polled["id"]] = answer


@pytest.mark.trial
async def test_server_killed_under_load_loses_no_change_of_answered_request(
    database_path: Path, http_session: aiohttp.ClientSession
) -> None:
    async with start_server(database_path) as (process, port):
        load = AnswerRecordingWorkers(http_session, port)
        async with asyncio.TaskGroup() as group:
            for _ in range(8):
                group.create_task(load.run_items_until_server_is_killed())
            await load.enough.wait()
            process.send_signal(signal.SIGKILL)
    assert len(load.known) >= 60
    async with start_server(database_path) as (_, port):
        load_after = AnswerRecordingWorkers(http_session, port)
        for work_id, item in load.known.items():
            after = await load_after.send_request("GET", f"/{work_id}")
            assert STATE_ORDER.index(after["state"]) >= STATE_ORDER.index(item["state"])
            for name in ("created_at", "acknowledged_at", "started_at", "stopped_at"):
                assert item[name] in {None, after[name]}
            assert item["metadata"].items() <= after["metadata"].items()
        stopped = [item for item in load.known.values() if item["state"] == "stopped"]
        assert stopped


async def test_server_kill_between_new_item_and_its_first_event_leaves_neither_in_database(
    database_path: Path,
) -> None:
    """A worker that gets an item without its first message would wait for that message forever."""
    program = Path(__file__).with_name("store_crashing_in_creation.py")
    root = Path(__file__).parents[2]
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        program,
        database_path,
        cwd=root,
        env={**os.environ, "PYTHONPATH": str(root)},
    )
    assert await process.wait() == -signal.SIGKILL
    store = SqliteStore(database_path)
    contents = await store.open()
    await store.close()
    assert (contents.sessions, contents.items, contents.events) == ([], [], [])
