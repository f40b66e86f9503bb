"""The cost of PostgreSQL drivers: the client's CPU time for the statements of one item.

    python benchmarks/postgres_drivers.py URL [--items N] [--connections N] [--rounds N]

URL is an empty database, in which the benchmark creates the tables of the control plane. An item is
claimed, acknowledged, extended once and stopped: four statements, each committed by itself.
`transaction` makes each of the four a transaction of two statements (read and lock, then write).
The drivers alternate. `psycopg pipeline` sends BEGIN together with the first statement.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import time
from typing import TYPE_CHECKING, Any, Final

import asyncpg
import psycopg
import uvloop

from workpool.server.postgres.migrations import migrate

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    Cycle = Callable[["Any"], Awaitable[bool]]

ENVIRONMENT: Final = "env_1"
COLUMNS: Final = """id, environment_id, session_id, created_at, type, state, metadata,
    acknowledged_at, started_at, heartbeat_at, stop_requested_at, stopped_at, holder, delivered_at,
    lease_end, ttl_seconds, beaten, version"""
CLAIM: Final = f"""
UPDATE items SET delivered_at = workpool_now(), holder = $2, version = version + 1
WHERE environment_id = $1 AND id = (
    SELECT id FROM items WHERE environment_id = $1 AND state = 'queued' AND delivered_at IS NULL
    ORDER BY id LIMIT 1 FOR UPDATE SKIP LOCKED)
RETURNING {COLUMNS}"""  # noqa: S608 - our own words
READ: Final = f"SELECT {COLUMNS} FROM items WHERE environment_id = $1 AND id = $2 FOR UPDATE"  # noqa: S608 - our own words
WRITES: Final = tuple(
    f"UPDATE items SET {changes}, version = version + 1 "  # noqa: S608 - our own words
    f"WHERE environment_id = $1 AND id = $2 RETURNING {COLUMNS}"
    for changes in (
        "state = 'starting', acknowledged_at = workpool_now(), lease_end = workpool_now()",
        "state = 'active', heartbeat_at = workpool_now(), lease_end = workpool_now()",
        "state = 'stopped', stopped_at = workpool_now(), lease_end = NULL",
    )
)


def to_psycopg_parameters(sql: str) -> str:
    """Convert the parameters `$1` and `$2` of an SQL statement to the notation of psycopg."""
    return sql.replace("$1", "%(a)s").replace("$2", "%(b)s")


PSYCOPG: Final = {sql: to_psycopg_parameters(sql) for sql in (CLAIM, READ, *WRITES)}


async def run_item_with_asyncpg(connection: Any) -> bool:
    row = await connection.fetchrow(CLAIM, ENVIRONMENT, "worker")
    if row is None:
        return False
    for sql in WRITES:
        assert dict(await connection.fetchrow(sql, ENVIRONMENT, row["id"]))
    return True


async def run_item_with_asyncpg_transactions(connection: Any) -> bool:
    row = await connection.fetchrow(CLAIM, ENVIRONMENT, "worker")
    if row is None:
        return False
    for sql in WRITES:
        async with connection.transaction():
            assert dict(await connection.fetchrow(READ, ENVIRONMENT, row["id"]))
            await connection.execute(sql, ENVIRONMENT, row["id"])
    return True


async def run_query_with_psycopg(connection: Any, sql: str, b: str) -> Any:
    cursor = connection.cursor(binary=True)
    await cursor.execute(PSYCOPG[sql], {"a": ENVIRONMENT, "b": b}, prepare=True)
    return await cursor.fetchone()


async def run_item_with_psycopg(connection: Any) -> bool:
    row = await run_query_with_psycopg(connection, CLAIM, "worker")
    if row is None:
        return False
    for sql in WRITES:
        assert await run_query_with_psycopg(connection, sql, row[0])
    return True


async def run_item_with_psycopg_transactions(connection: Any) -> bool:
    row = await run_query_with_psycopg(connection, CLAIM, "worker")
    if row is None:
        return False
    for sql in WRITES:
        async with connection.transaction():
            assert await run_query_with_psycopg(connection, READ, row[0])
            await run_query_with_psycopg(connection, sql, row[0])
    return True


async def run_item_with_psycopg_pipelines(connection: Any) -> bool:
    row = await run_query_with_psycopg(connection, CLAIM, "worker")
    if row is None:
        return False
    for sql in WRITES:
        async with connection.pipeline(), connection.transaction():
            assert await run_query_with_psycopg(connection, READ, row[0])
            await run_query_with_psycopg(connection, sql, row[0])
    return True


async def open_psycopg_connection(url: str) -> Any:
    return await psycopg.AsyncConnection.connect(url, autocommit=True)


DRIVERS: Final[dict[str, tuple[Callable[[str], Awaitable[Any]], Cycle]]] = {
    "asyncpg": (asyncpg.connect, run_item_with_asyncpg),
    "psycopg": (open_psycopg_connection, run_item_with_psycopg),
    "asyncpg transaction": (asyncpg.connect, run_item_with_asyncpg_transactions),
    "psycopg transaction": (open_psycopg_connection, run_item_with_psycopg_transactions),
    "psycopg pipeline": (open_psycopg_connection, run_item_with_psycopg_pipelines),
}


async def measure_driver(url: str, name: str, items: int, connections: int) -> tuple[float, float]:
    """Return the CPU time of this process per item in µs, and the items per second."""
    connect, cycle = DRIVERS[name]
    setup = await asyncpg.connect(url)
    await setup.execute("TRUNCATE items")
    await setup.execute(
        "INSERT INTO items (id, environment_id, session_id, created_at, type, state, metadata,"
        " ttl_seconds, beaten)"
        " SELECT 'work_' || to_char(n, 'FM00000000'), $1, 'sess_' || n, workpool_now(), 'session',"
        " 'queued', '{}', 30, false FROM generate_series(1, $2) AS n",
        ENVIRONMENT,
        items,
    )
    await setup.execute("VACUUM ANALYZE items")
    await setup.close()
    opened = [await connect(url) for _ in range(connections)]

    async def run_items_until_queue_is_empty(connection: Any) -> None:
        while await cycle(connection):
            pass

    started, cpu = time.perf_counter(), time.process_time()
    async with asyncio.TaskGroup() as group:
        for connection in opened:
            group.create_task(run_items_until_queue_is_empty(connection))
    cpu, seconds = time.process_time() - cpu, time.perf_counter() - started
    for connection in opened:
        await connection.close()
    return cpu / items * 1e6, items / seconds


async def compare_drivers(url: str, items: int, connections: int, rounds: int) -> None:
    await migrate(url)
    results: dict[str, list[tuple[float, float]]] = {name: [] for name in DRIVERS}
    for _ in range(rounds):
        for name, found in results.items():
            found.append(await measure_driver(url, name, items, connections))
    print("| driver | CPU µs/item | items/s |\n| --- | ---: | ---: |")
    for name, found in results.items():
        cpu, rate = (statistics.median(column) for column in zip(*found, strict=True))
        print(f"| {name} | {cpu:.0f} | {rate:.0f} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("url")
    parser.add_argument("--items", type=int, default=2000)
    parser.add_argument("--connections", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=5)
    given = parser.parse_args()
    uvloop.run(compare_drivers(given.url, given.items, given.connections, given.rounds))


if __name__ == "__main__":
    main()
