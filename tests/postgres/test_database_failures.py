"""Failures of the database and of nodes under load give 503s and lose no item."""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack, asynccontextmanager
from functools import partial
from typing import TYPE_CHECKING

import aiohttp
import pytest

from tests.postgres.control_plane_nodes import (
    SECONDS,
    NodeAnswer,
    NodeClient,
    make_node,
    read_line,
    start_node_process,
)
from workpool.server import summarize
from workpool.server.postgres import connection_pool, migrations
from workpool.server.postgres.connection_pool import open_connection
from workpool.server.postgres.migrations import Migration

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Sequence

    from tests.postgres.cluster import Cluster
    from workpool.server import ControlPlane

WORKERS = 4
RECLAIM_MS = 1000
"""An item whose delivery was lost with its answer returns after this time."""
CUT = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = 'workpool'"


class WorkersUnderLoad:
    """Workers on several nodes, which repeat each call that was answered with a 503.

    Attributes:
        refusals: The error messages of all 503s.
        created: The items whose creation was confirmed.
        stopped: The items whose stop was confirmed.
        holders: The worker whose ack was confirmed last, by item.
    """

    def __init__(self, http: aiohttp.ClientSession, planes: Sequence[ControlPlane]) -> None:
        self._http = http
        self._planes = planes
        self.refusals: list[str] = []
        self.created: list[str] = []
        self.stopped: set[str] = set()
        self.holders: dict[str, str] = {}
        self.has_enough_items = False
        self._refused = asyncio.Event()
        self._stopped = asyncio.Event()

    async def wait_for_503(self) -> None:
        """Wait until the next call is answered with a 503."""
        self._refused.clear()
        await self._refused.wait()

    async def wait_for_stopped_items(self, count: int) -> None:
        """Wait until the workers have stopped `count` more items."""
        target = len(self.stopped) + count
        while len(self.stopped) < target:
            self._stopped.clear()
            await self._stopped.wait()

    async def run_until_items_stopped(self) -> None:
        """Create items until `has_enough_items` is true, and run workers until all are stopped."""
        async with asyncio.TaskGroup() as group:
            group.create_task(self._create_items(self._make_client(0, "creator")))
            for number in range(WORKERS):
                group.create_task(
                    self._process_items_until_all_stopped(
                        self._make_client(number, f"worker-{number}")
                    )
                )

    def _make_client(self, number: int, worker: str) -> NodeClient:
        return NodeClient(self._http, self._planes[number % len(self._planes)].base_url, worker)

    def _are_all_items_stopped(self) -> bool:
        return self.has_enough_items and self.stopped >= set(self.created)

    async def _call_until_answered(
        self, call: Callable[[], Awaitable[NodeAnswer]], *more: int
    ) -> NodeAnswer:
        """Repeat a call until its answer is not a 503, and return that answer.

        `more`: statuses that are also allowed after a 503, whose call may have taken effect.
        """
        repeated = False
        while True:
            answer = await call()
            if answer.status != 503:
                assert answer.status in ({200, 204, *more} if repeated else {200, 204, 409}), answer
                return answer
            assert answer.headers["Retry-After"] == "1"
            assert answer.body["error"]["type"] == "api_error"
            self.refusals.append(answer.body["error"]["message"])
            repeated = True
            self._refused.set()
            await asyncio.sleep(0.05)

    async def _create_items(self, client: NodeClient) -> None:
        while not self.has_enough_items:
            answer = await self._call_until_answered(client.enqueue)
            self.created += [item["id"] for item in answer.body["data"]]
            await asyncio.sleep(0.01)

    async def _process_items_until_all_stopped(self, client: NodeClient) -> None:
        params = {"block_ms": "500", "reclaim_older_than_ms": str(RECLAIM_MS)}
        while not self._are_all_items_stopped():
            item = (await self._call_until_answered(partial(client.poll, params=params))).body
            if item is not None:
                await self._process_item(client, item["id"])

    async def _process_item(self, client: NodeClient, work_id: str) -> None:
        acked = await self._call_until_answered(partial(client.ack, work_id), 409)
        if acked.status == 409:
            # Another worker has acknowledged the item, or a stop call whose answer was lost has
            # stopped the item.
            return
        assert work_id not in self.holders, "two workers hold one item"
        self.holders[work_id] = client._worker
        first = partial(client.heartbeat, work_id, "NO_HEARTBEAT")
        # Allow a 412: an earlier try may have extended the lease although it was answered with 503.
        beaten = await self._call_until_answered(first, 412)
        state = beaten.body if beaten.status == 200 else beaten.body["error"]["details"]
        last = (state if beaten.status == 200 else state["current_state"])["last_heartbeat"]
        await self._call_until_answered(partial(client.heartbeat, work_id, last), 412)
        await self._call_until_answered(partial(client.stop, work_id, json={"force": True}))
        self.stopped.add(work_id)
        self._stopped.set()


@asynccontextmanager
async def run_nodes_under_load(url: str, nodes: int = 2) -> AsyncIterator[WorkersUnderLoad]:
    """Run nodes under load; afterwards check that all items are stopped in the database."""
    async with asyncio.timeout(4 * SECONDS), AsyncExitStack() as stack:
        http = await stack.enter_async_context(aiohttp.ClientSession())
        planes = [await stack.enter_async_context(make_node(url)) for _ in range(nodes)]
        load = WorkersUnderLoad(http, planes)
        async with asyncio.TaskGroup() as group:
            group.create_task(load.run_until_items_stopped())
            yield load
            load.has_enough_items = True
        # Read through a new node: the connections of the other nodes may have been terminated.
        reader = await stack.enter_async_context(make_node(url))
        summary = summarize(await reader.engine.read_history())
        items = await stack.enter_async_context(_stored_item_states(url))
        assert {work_id: items.get(work_id) for work_id in load.created} == dict.fromkeys(
            load.created, "stopped"
        )
        assert load.stopped >= set(load.created)
        # `created` may lack an item: an enqueue whose answer was lost may have created one.
        assert (summary.lost, summary.overlapping) == (0, 0)
        assert summary.stopped == summary.enqueued >= len(load.created) > 0


@asynccontextmanager
async def _stored_item_states(url: str) -> AsyncIterator[dict[str, str]]:
    connection = await open_connection(url)
    try:
        yield {row[0]: row[1] for row in await connection.fetch("SELECT id, state FROM items")}
    finally:
        await connection.close()


async def execute_sql(cluster: Cluster, statement: str, url: str | None = None) -> str:
    return await asyncio.to_thread(cluster.execute, statement, url)


@pytest.mark.parametrize("end", ["stop", "kill"])
async def test_database_that_restarts_under_load_loses_no_item(
    dedicated_postgres: Cluster, end: str
) -> None:
    async with run_nodes_under_load(dedicated_postgres.create_database()) as load:
        for _ in range(2):
            await load.wait_for_stopped_items(5)
            await asyncio.to_thread(
                dedicated_postgres.stop if end == "stop" else dedicated_postgres.kill_all_processes
            )
            await load.wait_for_503()
            await asyncio.to_thread(dedicated_postgres.start)
            await load.wait_for_stopped_items(1)
    assert load.refusals


async def test_terminated_database_connections_under_load_lose_no_item(
    dedicated_postgres: Cluster,
) -> None:
    async with run_nodes_under_load(dedicated_postgres.create_database()) as load:
        while len(load.refusals) < 5:
            await asyncio.sleep(0.05)
            await execute_sql(dedicated_postgres, CUT)


async def test_temporarily_read_only_database_gives_503s_and_loses_no_item(
    dedicated_postgres: Cluster,
) -> None:
    url = dedicated_postgres.create_database()
    name = url.rpartition("/")[2]
    async with run_nodes_under_load(url) as load:
        await execute_sql(
            dedicated_postgres, f"ALTER DATABASE {name} SET default_transaction_read_only = on"
        )
        await execute_sql(dedicated_postgres, CUT)
        for _ in range(20):
            await load.wait_for_503()
        # The open connections stay read-only, as after a failover, so the pool must replace them.
        await execute_sql(
            dedicated_postgres, f"ALTER DATABASE {name} RESET default_transaction_read_only"
        )


async def test_failover_to_a_standby_under_load_loses_no_item(
    dedicated_postgres: Cluster, standby: Cluster
) -> None:
    name = dedicated_postgres.create_database().rpartition("/")[2]
    hosts = f"127.0.0.1:{dedicated_postgres.port},127.0.0.1:{standby.port}"
    url = f"postgresql://workpool@{hosts}/{name}?target_session_attrs=read-write"
    async with run_nodes_under_load(url) as load:
        await load.wait_for_stopped_items(10)
        await asyncio.to_thread(dedicated_postgres.kill_all_processes)
        for _ in range(20):
            await load.wait_for_503()
        await asyncio.to_thread(standby.promote_to_primary)
        await load.wait_for_stopped_items(10)


@pytest.mark.parametrize(
    ("limits", "reason"),
    [
        (
            {"POOL_SIZE": 20, "STATEMENT_SECONDS": 0.3, "ACQUIRE_SECONDS": 20.0},
            "a statement took too long",
        ),
        # Without the lock, no call waits a second for one of the two connections.
        (
            {"POOL_SIZE": 2, "STATEMENT_SECONDS": 3.0, "ACQUIRE_SECONDS": 1.0},
            "all connections are in use",
        ),
    ],
    ids=["many connections", "few connections"],
)
async def test_locked_table_gives_503s_and_logs_the_reason(
    dedicated_postgres: Cluster,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    limits: dict[str, float],
    reason: str,
) -> None:
    for name, value in limits.items():
        monkeypatch.setattr(connection_pool, name, value)
    monkeypatch.setattr(connection_pool, "_LOG_SECONDS", 0.0)
    url = dedicated_postgres.create_database()
    async with run_nodes_under_load(url) as load:
        blocker = await open_connection(url, statement_seconds=SECONDS)
        async with blocker.transaction():
            await blocker.execute("LOCK TABLE items IN ACCESS EXCLUSIVE MODE")
            caplog.clear()  # Ignore what a slow machine has logged before the lock.
            async with asyncio.timeout(SECONDS):
                while f"database is not available: {reason}" not in caplog.messages:
                    await load.wait_for_503()
        await blocker.close()


@pytest.mark.parametrize("call", ["work", "poll", "ack", "heartbeat", "stop"])
async def test_node_killed_between_commit_and_answer_loses_no_item(
    database_url: str, call: str
) -> None:
    async with (
        asyncio.timeout(2 * SECONDS),
        make_node(database_url) as plane,
        start_node_process(database_url, call) as process,
        aiohttp.ClientSession() as http,
        asyncio.TaskGroup() as group,
    ):
        dying = NodeClient(http, await read_line(process), "a")
        client, other = (NodeClient(http, plane.base_url, name) for name in ("a", "b"))
        work_id = ""
        before: list[Callable[[], Awaitable[NodeAnswer]]] = [
            client.enqueue,
            client.poll,
            lambda: client.ack(work_id),
            lambda: client.heartbeat(work_id, "NO_HEARTBEAT"),
        ]
        calls: dict[str, Callable[[NodeClient], Awaitable[NodeAnswer]]] = {
            "work": lambda c: c.enqueue(),
            "poll": lambda c: c.poll(params={"reclaim_older_than_ms": str(RECLAIM_MS)}),
            "ack": lambda c: c.ack(work_id),
            "heartbeat": lambda c: c.heartbeat(work_id, "NO_HEARTBEAT"),
            "stop": lambda c: c.stop(work_id, json={"force": True}),
        }
        for place, step in enumerate(before[: list(calls).index(call)]):
            answer = await step()
            assert answer.status == 200
            work_id = answer.body["data"][0]["id"] if place == 0 else work_id
        held = group.create_task(_expect_no_answer(calls[call](dying)))
        assert await read_line(process) == "held"
        process.kill()
        await held
        if call == "work":  # The creation was committed, so the other node delivers the item.
            assert (await client.poll()).body["state"] == "queued"
            return
        if call == "poll":  # Nobody received the delivery, so the item is delivered again.
            while (item := (await calls[call](client)).body) is None:  # noqa: ASYNC110 - no event
                await asyncio.sleep(0.05)
            assert item["id"] == work_id
            return
        assert (await other.poll(params={"reclaim_older_than_ms": "1"})).body is None
        assert (await other.ack(work_id)).status == 409
        repeated = await calls[call](client)
        assert repeated.status == (412 if call == "heartbeat" else 200)
        records: list[str] = [each.kind for each in await plane.engine.read_history()]
        assert records.count({"ack": "acked", "stop": "stopped"}.get(call, call)) == 1


async def _expect_no_answer(call: Awaitable[NodeAnswer]) -> None:
    with pytest.raises(aiohttp.ClientConnectionError):
        await call


async def test_nodes_of_two_releases_share_a_database_during_an_upgrade(
    dedicated_postgres: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = dedicated_postgres.create_database()
    steps = migrations.load_migrations()
    version = steps[-1].version + 1
    step = Migration(
        version,
        1,
        "ALTER TABLE items ADD COLUMN priority integer NOT NULL DEFAULT 0;"
        "ALTER TABLE sessions ADD COLUMN region text;"
        "ALTER TABLE events ADD COLUMN region text;"
        "CREATE TABLE regions (name text PRIMARY KEY);",
    )
    async with run_nodes_under_load(url) as load:
        await load.wait_for_stopped_items(20)
        releases = migrations.load_migrations
        monkeypatch.setattr(migrations, "load_migrations", lambda: (*steps, step))
        async with make_node(url) as newer:  # a node of the next release migrates the schema
            stored = await execute_sql(
                dedicated_postgres, "SELECT max(version) FROM schema_versions", url
            )
            assert stored == str(version)
            client = NodeClient(load._http, newer.base_url, "newer")
            for _ in range(10):
                await load._call_until_answered(client.enqueue)
            await load.wait_for_stopped_items(20)
        monkeypatch.setattr(migrations, "load_migrations", releases)
        async with make_node(url):  # a node of the older release starts on the newer schema
            pass
    assert load.refusals == []
