"""Schema migrations: each runs once and in order; a node refuses a schema that is too new."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import pytest

from tests.postgres.test_connection_pool import DEADLOCKS_FUNCTION
from workpool.server import StoreError
from workpool.server.postgres import migrations
from workpool.server.postgres.connection_pool import open_connection
from workpool.server.postgres.migrations import Migration, migrate

if TYPE_CHECKING:
    from tests.postgres.cluster import Cluster

FIRST = Migration(1, 1, "CREATE TABLE number (value int)")
SECOND = Migration(2, 1, "ALTER TABLE number ADD COLUMN name text; CREATE TABLE other (id int)")
THIRD = Migration(3, 2, "CREATE TABLE third (id int)")
WAITS_FOR_TABLE = """
SELECT count(*) > 0 FROM pg_locks JOIN pg_database AS d ON d.oid = database
WHERE relation = 'number'::regclass AND NOT granted AND d.datname = current_database()
"""
"""Whether a connection waits for a lock on the table `number`."""
SECONDS = 45


def test_migrations_have_contiguous_versions_and_keep_previous_schema_version_usable() -> None:
    steps = migrations.load_migrations()
    assert [step.version for step in steps] == list(range(1, len(steps) + 1))
    assert all(step.oldest <= max(1, step.version - 1) for step in steps)
    oldest = [step.oldest for step in steps]
    assert oldest == sorted(oldest)


async def test_migrations_create_the_tables_on_first_run_and_change_nothing_on_second(
    postgres: Cluster, database_url: str
) -> None:
    steps = len(migrations.load_migrations())
    assert await migrate(database_url) == steps
    assert await migrate(database_url) == 0
    clock = "SELECT abs(workpool_now() / 1e6 - extract(epoch FROM now())) < 60"
    assert postgres.execute(clock, database_url) == "t"


async def test_second_migration_run_adds_each_migration_that_database_lacks(
    postgres: Cluster, database_url: str
) -> None:
    assert await migrate(database_url, [FIRST]) == 1
    assert await migrate(database_url, [FIRST, SECOND, THIRD]) == 2
    versions = "SELECT version, oldest FROM schema_versions ORDER BY version"
    assert postgres.execute(versions, database_url) == "1|1\n2|1\n3|2"


async def test_each_migration_runs_once_if_six_nodes_start_together(database_url: str) -> None:
    applied = await asyncio.gather(*(migrate(database_url, [FIRST, SECOND]) for _ in range(6)))
    assert sum(applied) == 2


async def test_failed_migration_leaves_database_unchanged(
    postgres: Cluster, database_url: str
) -> None:
    broken = Migration(2, 1, "CREATE TABLE other (id int); SELECT 1 / 0")
    with pytest.raises(Exception, match="division by zero"):
        await migrate(database_url, [FIRST, broken])
    assert postgres.execute("SELECT max(version) FROM schema_versions", database_url) == "1"
    assert postgres.execute("SELECT to_regclass('other') IS NULL", database_url) == "t"
    assert await migrate(database_url, [FIRST, SECOND]) == 1


async def test_migration_accepts_schema_of_newer_release_unless_it_is_incompatible(
    database_url: str,
) -> None:
    await migrate(database_url, [FIRST, SECOND])
    assert await migrate(database_url, [FIRST]) == 0
    await migrate(database_url, [FIRST, SECOND, THIRD])
    assert await migrate(database_url, [FIRST, SECOND]) == 0
    with pytest.raises(StoreError, match=r"has version 3, .* knows version 2; this one knows 1"):
        await migrate(database_url, [FIRST])


async def test_migration_waiting_for_a_locked_table_does_not_block_other_statements(
    database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(migrations, "LOCK_SECONDS", 0.1)
    await migrate(database_url, [FIRST])
    reader = await open_connection(database_url)
    async with asyncio.timeout(SECONDS), asyncio.TaskGroup() as group:
        transaction = reader.transaction()
        await transaction.start()
        await reader.execute("SELECT * FROM number")
        migration = group.create_task(migrate(database_url, [FIRST, SECOND]))
        other = await open_connection(database_url)
        # The migration tries repeatedly to lock the table, each time for `LOCK_SECONDS`. Statements
        # of other connections run between these tries.
        for _ in range(5):
            while not await other.fetchval(WAITS_FOR_TABLE):  # noqa: ASYNC110 - no event
                await asyncio.sleep(0.01)
            await other.execute("SELECT * FROM number")
        assert not migration.done()
        await transaction.rollback()
        assert await migration == 1
    await reader.close()
    await other.close()


async def test_migration_rolled_back_by_deadlock_is_repeated(
    database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(migrations, "LOCK_SECONDS", 0.05)
    await migrate(database_url, [FIRST, Migration(2, 1, DEADLOCKS_FUNCTION)])
    deadlocking = Migration(3, 1, "SELECT raise_two_deadlocks()")
    assert await migrate(database_url, [FIRST, SECOND, deadlocking]) == 1


async def test_migration_without_its_table_lock_fails_with_store_error(
    database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(migrations, "LOCK_SECONDS", 0.05)
    monkeypatch.setattr(migrations, "_ATTEMPTS", 5)
    await migrate(database_url, [FIRST])
    reader = await open_connection(database_url)
    async with reader.transaction():
        await reader.execute("SELECT * FROM number")
        with pytest.raises(StoreError, match="kept its tables locked"):
            await migrate(database_url, [FIRST, SECOND])
    await reader.close()


async def test_migration_by_role_without_create_rights_accepts_schema_that_is_up_to_date(
    dedicated_postgres: Cluster,
) -> None:
    url = dedicated_postgres.create_database()
    await migrate(url, [FIRST])
    dedicated_postgres.execute("CREATE ROLE app LOGIN; GRANT SELECT ON schema_versions TO app", url)
    assert await migrate(url.replace("workpool@", "app@"), [FIRST]) == 0
