"""Migrations of the database schema. Nodes of the previous release may run at the same time.

A migration goes forward only and is one transaction under an advisory lock, so that nodes which
start together run it once. It must work with nodes of the previous release, which run during the
upgrade: it only adds tables, functions, and columns that are nullable or have a constant default,
never an index to a table that may be large. A column or table that no code uses anymore is removed
one release after its last use, in a migration with a higher `oldest`. See
workpool/docs/control-plane.md, "PostgreSQL".
"""

from __future__ import annotations

import asyncio
from importlib.resources import files
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import asyncpg

from workpool.server.api_errors import StoreError
from workpool.server.postgres.connection_pool import redact_url, start_connection

if TYPE_CHECKING:
    from collections.abc import Sequence

MIGRATION_SECONDS: Final = 600.0
"""Longest time of one statement of a migration, and of the wait for another node's migration."""
LOCK_SECONDS: Final = 0.5
"""Longest time for which a migration waits for a lock on a table.

All calls that need the table wait behind it meanwhile. The time is shorter than 1 s, the
default of the database's `deadlock_timeout`, so that a deadlock usually rolls back the migration,
not a call.
"""
_ATTEMPTS: Final = 120
_ADVISORY_LOCK: Final = 0x776F726B706F6F6C
"""A number for the advisory lock: "workpool"."""

_VERSIONS: Final = """
CREATE TABLE IF NOT EXISTS schema_versions (
    version    integer PRIMARY KEY,
    oldest     integer NOT NULL,
    applied_at timestamptz NOT NULL DEFAULT clock_timestamp()
)
"""


class Migration(NamedTuple):
    """One step from a version of the schema to the next.

    Attributes:
        version: The schema's version after this step, one more than the version before.
        oldest: The oldest version of the schema whose nodes may use the database afterwards.
        sql: The statements.
    """

    version: int
    oldest: int
    sql: str


def load_migrations() -> tuple[Migration, ...]:
    """Return all migrations of this release, in ascending order of versions."""
    return tuple(
        Migration(version, oldest, (files(__package__) / "schema" / name).read_text("utf-8"))
        for version, oldest, name in _MIGRATIONS
    )


_MIGRATIONS: Final = ((1, 1, "001.sql"),)
"""Version, oldest version and file of each migration."""


async def migrate(url: str, steps: Sequence[Migration] | None = None) -> int:
    """Upgrade a database to this release's schema; return the number of migrations that ran.

    A schema that is newer stays as it is if this release can use it.

    Args:
        url: The database.
        steps: All migrations, in order; None: those of this release.

    Raises:
        StoreError: The database cannot be reached, or its schema is too new for this release.
    """
    steps = load_migrations() if steps is None else steps
    async with start_connection(url, statement_seconds=MIGRATION_SECONDS) as connection:
        version = await _read_usable_schema_version(url, connection, steps)
        missing = [step for step in steps if step.version > version]
        applied = [await _apply_migration(url, connection, steps, step) for step in missing]
    return sum(applied)


async def _read_usable_schema_version(url: str, connection: Any, steps: Sequence[Migration]) -> int:
    """Return the schema version; 0: no schema. Raises `StoreError` for an unusable version."""
    if await connection.fetchval("SELECT to_regclass('schema_versions')") is None:
        return 0
    version, oldest = await connection.fetchrow(
        "SELECT coalesce(max(version), 0), coalesce(max(oldest), 0) FROM schema_versions"
    )
    if oldest > steps[-1].version:
        raise StoreError(
            f"store {redact_url(url)}: its schema has version {version}, which needs a release "
            f"that knows version {oldest}; this one knows {steps[-1].version}"
        )
    return int(version)


async def _apply_migration(
    url: str, connection: Any, steps: Sequence[Migration], step: Migration
) -> bool:
    """Run a migration unless another node has run it; return whether it ran here.

    Raises `StoreError`.
    """
    for _ in range(_ATTEMPTS):
        try:
            async with connection.transaction():
                return await _run_migration(url, connection, steps, step)
        except (asyncpg.LockNotAvailableError, asyncpg.DeadlockDetectedError):
            # While a migration waits for a lock, other calls wait behind the migration. The pause
            # before the next attempt lets these calls run.
            await asyncio.sleep(LOCK_SECONDS)
    raise StoreError(
        f"store {redact_url(url)}: other transactions kept its tables locked, so that its schema "
        f"could not be changed"
    )


async def _run_migration(
    url: str, connection: Any, steps: Sequence[Migration], step: Migration
) -> bool:
    """Run one migration in the open transaction, unless another node has run it."""
    await connection.execute("SELECT pg_advisory_xact_lock($1)", _ADVISORY_LOCK)
    await connection.execute(_VERSIONS)
    if await _read_usable_schema_version(url, connection, steps) >= step.version:
        return False
    await connection.execute(f"SET LOCAL lock_timeout = {LOCK_SECONDS * 1000:.0f}")
    await connection.execute(step.sql)
    await connection.execute(
        "INSERT INTO schema_versions (version, oldest) VALUES ($1, $2)", step.version, step.oldest
    )
    return True
