"""Tests of the connection pool: its limits, and driver errors that become 503s."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
from contextlib import AsyncExitStack, suppress
from typing import TYPE_CHECKING, Any

import asyncpg
import pytest

from workpool.server import ServeError, StoreError
from workpool.server.postgres import connection_pool
from workpool.server.postgres.connection_pool import ConnectionPool, redact_url
from workpool.server.postgres.database_errors import (
    RetryableError,
    UnavailableError,
    to_unavailable_error,
)

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from tests.postgres.cluster import Cluster

SECONDS = 45.0
SESSIONS = "SELECT count(*) FROM pg_stat_activity"
CLIENT_PROCESS = """
SELECT pid FROM pg_stat_activity
WHERE datname = current_database() AND application_name = 'workpool'
"""
HIDDEN = "secret-Zx9"


@pytest.fixture
async def pool(database_url: str) -> AsyncIterator[ConnectionPool]:
    pool = ConnectionPool(database_url, size=2)
    await pool.open()
    yield pool
    await pool.close()


async def wait_until_available(pool: ConnectionPool) -> int:
    """Repeat a query until the database answers; return the number of 503s before that."""
    refusals = 0
    async with asyncio.timeout(SECONDS):
        while True:
            with suppress(UnavailableError):
                assert await pool.fetchval("SELECT 7") == 7
                return refusals
            refusals += 1
            await asyncio.sleep(0.05)


async def open_pool_with_short_statement_limit(
    url: str, monkeypatch: pytest.MonkeyPatch
) -> ConnectionPool:
    """Open a pool whose first connection has a short limit; later connections have the usual."""
    pool = ConnectionPool(url)
    with monkeypatch.context() as limits:
        limits.setattr(connection_pool, "STATEMENT_SECONDS", 0.2)
        await pool.open()
    return pool


async def test_connection_pool_returns_statement_result_and_commits_statement(
    pool: ConnectionPool, database_url: str, postgres: Cluster
) -> None:
    await pool.execute("CREATE TABLE number (value int)")
    assert await pool.execute("INSERT INTO number VALUES ($1), ($2)", 7, 8) == "INSERT 0 2"
    assert [row["value"] for row in await pool.fetch("SELECT value FROM number")] == [7, 8]
    assert (await pool.fetchrow("SELECT value FROM number WHERE value > $1", 7))["value"] == 8
    assert postgres.execute("SELECT count(*) FROM number", database_url) == "2"


# A sequence keeps its value when a transaction is rolled back, so it can count the attempts.
DEADLOCKS_FUNCTION = """
    CREATE SEQUENCE attempts;
    CREATE FUNCTION raise_two_deadlocks() RETURNS bigint LANGUAGE plpgsql AS $$
    DECLARE attempt bigint := nextval('attempts');
    BEGIN
        IF attempt < 3 THEN RAISE 'deadlock' USING ERRCODE = 'deadlock_detected'; END IF;
        RETURN attempt;
    END $$
"""


async def test_statement_rolled_back_by_deadlock_is_repeated(pool: ConnectionPool) -> None:
    await pool.execute(DEADLOCKS_FUNCTION)
    assert await pool.fetchval("SELECT raise_two_deadlocks()") == 3


async def test_transaction_is_undone_if_its_block_raises_exception(pool: ConnectionPool) -> None:
    await pool.execute("CREATE TABLE number (value int)")

    async def fail_in_transaction() -> None:
        async with pool.transaction() as connection:
            await connection.execute("INSERT INTO number VALUES (7)")
            raise LookupError

    with pytest.raises(LookupError):
        await fail_in_transaction()
    assert await pool.fetchval("SELECT count(*) FROM number") == 0


async def test_transaction_that_continues_after_a_failed_statement_raises_error(
    pool: ConnectionPool,
) -> None:
    async def continue_transaction_after_error() -> None:
        async with pool.transaction() as connection:
            with suppress(asyncpg.DivisionByZeroError):
                await connection.fetchval("SELECT 1 / 0")

    with pytest.raises(RuntimeError, match="after a failed statement"):
        await continue_transaction_after_error()
    assert await pool.fetchval("SELECT 7") == 7


async def test_database_calls_beyond_pool_size_wait_for_a_connection(pool: ConnectionPool) -> None:
    sql = "SELECT pg_backend_pid() FROM pg_sleep(0.01)"
    found = await asyncio.gather(*(pool.fetchval(sql) for _ in range(40)))
    assert 1 <= len(set(found)) <= 2


async def test_database_call_cancelled_while_it_waits_keeps_no_connection(
    pool: ConnectionPool,
) -> None:
    async with asyncio.timeout(SECONDS), asyncio.TaskGroup() as group, AsyncExitStack() as stack:
        for _ in range(2):
            await stack.enter_async_context(pool.transaction())
        first, second = (group.create_task(pool.fetchval("SELECT 7")) for _ in range(2))
        await asyncio.sleep(0)
        await stack.aclose()  # the first call gets a connection, and is then cancelled
        first.cancel()
        assert await second == 7


async def test_statement_raises_503_while_all_database_connections_are_in_use(
    pool: ConnectionPool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(connection_pool, "ACQUIRE_SECONDS", 0.2)
    async with pool.transaction(), pool.transaction():
        with pytest.raises(UnavailableError, match="all connections are in use") as raised:
            await pool.fetchval("SELECT 7")
        assert (raised.value.status, raised.value.retry_after) == (503, 1)
        with pytest.raises(UnavailableError):
            await pool.fetchval("SELECT 7")
    assert await pool.fetchval("SELECT 7") == 7
    assert [r.message for r in caplog.records if r.levelno == logging.WARNING] == [
        "database is not available: all connections are in use"
    ]


async def test_statement_that_exceeds_time_limit_is_cancelled_and_raises_503(
    database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Give the database time to cancel the statement before the client ends the connection.
    monkeypatch.setattr(connection_pool, "_ANSWER_SECONDS", SECONDS)
    pool = await open_pool_with_short_statement_limit(database_url, monkeypatch)
    try:
        with pytest.raises(UnavailableError, match="a statement took too long"):
            await pool.execute("SELECT pg_sleep(600)")
        await wait_until_available(pool)
    finally:
        await pool.close()


async def test_write_to_read_only_database_raises_503_until_it_is_writable(
    pool: ConnectionPool, postgres: Cluster, database_url: str
) -> None:
    name = database_url.rpartition("/")[2]
    await pool.execute("CREATE TABLE number (value int)")
    postgres.execute(f"ALTER DATABASE {name} SET default_transaction_read_only = on")
    await terminate_connections(pool, postgres, name)
    with pytest.raises(UnavailableError, match="read-only"):
        await pool.execute("INSERT INTO number VALUES (7)")
    # The open connections stay read-only, so the pool must replace them.
    postgres.execute(f"ALTER DATABASE {name} SET default_transaction_read_only = off")
    assert await pool.execute("INSERT INTO number VALUES (7)") == "INSERT 0 1"


async def terminate_connections(pool: ConnectionPool, postgres: Cluster, name: str) -> None:
    """Terminate all connections to a database, and wait until the pool has replaced them."""
    postgres.execute(
        f"SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = '{name}'"  # noqa: S608 - our own name
    )
    await wait_until_available(pool)


async def test_statement_on_terminated_connection_raises_503(
    pool: ConnectionPool, postgres: Cluster
) -> None:
    async def run_statement_until_terminated() -> None:
        with pytest.raises(UnavailableError):
            await pool.execute("SELECT pg_sleep(600)")

    async with asyncio.timeout(SECONDS), asyncio.TaskGroup() as group:
        group.create_task(run_statement_until_terminated())
        ended = ""
        while "t" not in ended:
            ended = await asyncio.to_thread(
                postgres.execute,
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
                "WHERE query = 'SELECT pg_sleep(600)'",
            )
    await wait_until_available(pool)


@pytest.mark.parametrize("end", ["restart", "kill"])
async def test_connection_pool_works_again_after_database_restart(
    dedicated_postgres: Cluster, end: str
) -> None:
    pool = ConnectionPool(dedicated_postgres.create_database())
    await pool.open()
    try:
        if end == "kill":
            await asyncio.to_thread(dedicated_postgres.kill_all_processes)
            with pytest.raises(UnavailableError):
                await pool.fetchval("SELECT 7")
            await asyncio.to_thread(dedicated_postgres.start)
        else:
            await asyncio.to_thread(dedicated_postgres.restart)
        await wait_until_available(pool)
    finally:
        await pool.close()


async def test_statement_without_answer_raises_503_and_its_connection_is_replaced(
    database_url: str, postgres: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connection_pool, "_ANSWER_SECONDS", 0.2)
    pool = await open_pool_with_short_statement_limit(database_url, monkeypatch)
    # Do not ask the pool for the process: on a busy machine, the limit is too short for an answer.
    process = int(await asyncio.to_thread(postgres.execute, CLIENT_PROCESS, database_url))
    os.kill(process, signal.SIGSTOP)  # the server is now silent, like behind a broken network
    try:
        async with asyncio.timeout(SECONDS):
            with pytest.raises(UnavailableError, match="did not answer in time"):
                await pool.fetchval("SELECT 7")
            await wait_until_available(pool)
    finally:
        os.kill(process, signal.SIGCONT)
        await pool.close()


async def test_statement_raises_503_if_database_role_has_too_many_connections(
    dedicated_postgres: Cluster,
) -> None:
    url = dedicated_postgres.create_database()
    role = "CREATE ROLE app LOGIN CONNECTION LIMIT 1"
    dedicated_postgres.execute(role)
    pool = ConnectionPool(url.replace("workpool@", "app@"), size=2)
    await pool.open()
    try:
        async with pool.transaction():
            with pytest.raises(UnavailableError, match="too many connections"):
                await pool.fetchval("SELECT 7")
        assert await pool.fetchval("SELECT 7") == 7
    finally:
        await pool.close()


async def test_deadlock_and_serialization_failure_are_retried(pool: ConnectionPool) -> None:
    calls = 0

    async def fail_in_first_two_calls() -> int:
        nonlocal calls
        calls += 1
        if calls < 3:
            await pool.execute("DO $$ BEGIN RAISE SQLSTATE '40P01'; END $$")
        return calls

    assert await pool.retry_colliding_call(fail_in_first_two_calls) == 3

    async def fail_transaction_in_every_call() -> None:
        await pool.execute("DO $$ BEGIN RAISE SQLSTATE '40001'; END $$")

    with pytest.raises(RetryableError):
        await pool.retry_colliding_call(fail_transaction_in_every_call)


async def test_colliding_statement_is_attempted_at_most_six_times(pool: ConnectionPool) -> None:
    await pool.execute("CREATE SEQUENCE attempts")  # a rollback does not reset a sequence
    statement = (
        "DO $$ BEGIN IF nextval('attempts') <> {} THEN RAISE SQLSTATE '40001'; END IF; END $$"
    )
    with pytest.raises(RetryableError):
        await pool.execute(statement.format(7))
    assert await pool.fetchval("SELECT last_value FROM attempts") == 6
    await pool.execute(statement.format(12))
    assert await pool.fetchval("SELECT last_value FROM attempts") == 12


async def test_wrong_statement_raises_original_error_of_database_driver(
    pool: ConnectionPool,
) -> None:
    await pool.execute("CREATE TABLE number (value int PRIMARY KEY)")
    await pool.execute("INSERT INTO number VALUES (7)")
    with pytest.raises(asyncpg.UniqueViolationError):
        await pool.execute("INSERT INTO number VALUES (7)")
    with pytest.raises(asyncpg.UndefinedTableError):
        await pool.fetch("SELECT 1 FROM missing")
    with pytest.raises(asyncpg.DataError):
        await pool.fetchval("SELECT $1::int", "seven")
    assert await pool.fetchval("SELECT 7") == 7


async def test_cancelled_database_call_frees_its_connection(
    pool: ConnectionPool, postgres: Cluster
) -> None:
    for _ in range(4):  # the pool has fewer than four connections
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.1):
                await pool.execute("SELECT pg_sleep(600)")
    assert await pool.fetchval("SELECT 7") == 7
    running = "query = 'SELECT pg_sleep(600)' AND state = 'active'"
    async with asyncio.timeout(SECONDS):
        while await asyncio.to_thread(postgres.execute, f"{SESSIONS} WHERE {running}") != "0":
            pass


async def test_statement_on_closed_connection_pool_raises_503(pool: ConnectionPool) -> None:
    await pool.close()
    with pytest.raises(UnavailableError, match="this node ends"):
        await pool.fetchval("SELECT 7")


@pytest.mark.parametrize(
    ("url", "error", "words"),
    [
        ("postgresql://u:{}@127.0.0.1:1/x", StoreError, "cannot be reached"),
        ("postgresql://u:{}@127.0.0.1:nonsense/x", ServeError, "cannot be read"),
        ("postgresql://u:{}@127.0.0.1/x?sslmode=never", ServeError, "cannot be read"),
    ],
)
async def test_database_start_error_names_url_without_password(
    url: str, error: type[Exception], words: str
) -> None:
    pool = ConnectionPool(url.format(HIDDEN))
    with pytest.raises(error, match=words) as raised:
        await pool.open()
    assert "127.0.0.1" in str(raised.value)
    assert HIDDEN not in f"{raised.value}{pool!r}"


async def test_start_error_names_the_missing_database(postgres: Cluster) -> None:
    with pytest.raises(StoreError, match=r"127.0.0.1:\d+/absent: the database does not exist"):
        await ConnectionPool(postgres.url("absent")).open()


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        (f"postgresql://u:{HIDDEN}@db:5432/work", "postgresql://db:5432/work"),
        (f"postgresql://u:p@{HIDDEN}@db/work", "postgresql://db/work"),
        (f"postgresql://db/work?password={HIDDEN}", "postgresql://db/work"),
        (f"postgresql://[{HIDDEN}", "postgresql://…"),
        ("postgres://a,b:1/work", "postgresql://a,b:1/work"),
    ],
)
def test_redacted_database_url_contains_no_password(url: str, shown: str) -> None:
    assert redact_url(url) == shown


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (asyncpg.AdminShutdownError("x"), "it was shut down"),
        (asyncpg.CannotConnectNowError("x"), "it starts or ends"),
        (asyncpg.DiskFullError("x"), "it has no resources left"),
        (asyncpg.InvalidPasswordError("x"), "it refused the login"),
        (asyncpg.ConnectionDoesNotExistError("x"), "the connection was lost"),
        (asyncpg.InterfaceError("connection is closed"), "the connection was lost"),
        (asyncpg.InternalClientError("cannot switch to state 15"), "the connection was lost"),
        (asyncpg.OutdatedSchemaCacheError("x"), "its schema was changed"),
        (asyncpg.InterfaceError("another operation is in progress"), None),
        (asyncpg.TargetServerAttributeNotMatched("x"), "it is read-only"),
        (asyncpg.CheckViolationError("x"), None),
        (asyncpg.InternalServerError("x"), None),
        (ConnectionResetError(), "it cannot be reached"),
        (TimeoutError(), "it did not answer in time"),
    ],
)
def test_database_driver_error_becomes_unavailable_error_only_if_temporary(
    error: Exception, reason: str | None
) -> None:
    translated: Any = to_unavailable_error(error)
    assert (None if translated is None else translated.reason) == reason
