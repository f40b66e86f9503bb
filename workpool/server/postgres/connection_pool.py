"""The connections of one node to its database: a bounded number, and no call that waits forever.

The only module that opens a connection. Every driver's error that may be gone after some time
becomes an `UnavailableError`. No error and no log record contains the database's password.
"""

from __future__ import annotations

import asyncio
import logging
import random
import time
from contextlib import asynccontextmanager, suppress
from typing import TYPE_CHECKING, Any, Final, Protocol, TypeVar
from urllib.parse import urlsplit

import asyncpg

from workpool.server.api_errors import ServeError, StoreError
from workpool.server.postgres.database_errors import (
    DRIVER_ERRORS,
    READ_ONLY,
    RetryableError,
    UnavailableError,
    unavailable,
)

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
    from contextlib import AbstractAsyncContextManager

log = logging.getLogger("workpool.server.postgres")

T = TypeVar("T")

POOL_SIZE: Final = 10
"""Largest number of connections for calls; a node has one more, which listens."""
CONNECT_SECONDS: Final = 5.0
ACQUIRE_SECONDS: Final = 5.0
"""Time for which a call waits for a free connection."""
STATEMENT_SECONDS: Final = 5.0
"""Time after which the database cancels a statement."""
_ANSWER_SECONDS: Final = STATEMENT_SECONDS + 2.0
"""Time after which a statement counts as lost if the database has not even cancelled it."""
_START_ERRORS: Final = (*DRIVER_ERRORS, ValueError)
"""The driver's errors, and those of a URL that it cannot read."""
_RELEASE_SECONDS: Final = 2.0
_IDLE_SECONDS: Final = 300.0
_RETRIES: Final = 5
_RETRY_SECONDS: Final = 0.01
_LOG_SECONDS: Final = 5.0
"""Shortest time between two log records about a database that is not available."""


class Connection(Protocol):
    """A connection to the database; its rows are read by name or by place."""

    async def fetch(self, query: str, *args: object) -> Sequence[Any]:
        """Run a statement and return its rows."""

    async def fetchrow(self, query: str, *args: object) -> Any:
        """Run a statement and return its first row; None if it has none."""

    async def fetchval(self, query: str, *args: object) -> Any:
        """Run a statement and return the first column of its first row; None if it has none."""

    async def execute(self, query: str, *args: object) -> str:
        """Run a statement and return its status, such as `UPDATE 1`.

        Without arguments, `query` may be several statements.
        """

    def transaction(self) -> AbstractAsyncContextManager[object]:
        """Return a context that is one transaction, or a savepoint in one."""


def shown_url(url: str) -> str:
    """Return the host, port and database of a database's URL, without user and password."""
    try:
        parts = urlsplit(url)
    except ValueError:
        return "postgresql://…"
    return f"postgresql://{parts.netloc.rpartition('@')[2]}{parts.path}"


class ConnectionPool:
    """The connections of one node, opened when they are needed.

    Each method takes a connection, runs one statement in a transaction of its own, and returns once
    that is committed. Raises `UnavailableError` if the database is not available now.

    Args:
        url: The database, `postgresql://USER:PASSWORD@HOST:PORT/NAME?PARAMETER=VALUE`.
        size: Largest number of connections.
    """

    def __init__(self, url: str, *, size: int = POOL_SIZE) -> None:
        self._url = url
        self._size = size
        self._pool: Any = None
        self._logged_at = float("-inf")

    def __repr__(self) -> str:
        return f"ConnectionPool({shown_url(self._url)!r})"

    async def open(self) -> None:
        """Open the first connection. Raises `StoreError` or `ServeError`."""
        pool = asyncpg.create_pool(
            min_size=1,
            max_size=self._size,
            max_inactive_connection_lifetime=_IDLE_SECONDS,
            reset=_keep,
            **_options(self._url, STATEMENT_SECONDS, _ANSWER_SECONDS),
        )
        try:
            async with asyncio.timeout(2 * CONNECT_SECONDS):
                await pool
        except _START_ERRORS as error:
            raise _start_error(self._url, error) from None
        self._pool = pool

    async def close(self) -> None:
        """Close all connections; may be called twice, or without `open`."""
        pool, self._pool = self._pool, None
        if pool is None:
            return
        try:
            async with asyncio.timeout(_RELEASE_SECONDS):
                await pool.close()
        except DRIVER_ERRORS:
            pool.terminate()

    async def fetch(self, query: str, *args: object) -> Sequence[Any]:
        """Run a statement and return its rows."""
        async with self.connection() as connection:
            return await connection.fetch(query, *args)

    async def fetchrow(self, query: str, *args: object) -> Any:
        """Run a statement and return its first row; None if it has none."""
        async with self.connection() as connection:
            return await connection.fetchrow(query, *args)

    async def fetchval(self, query: str, *args: object) -> Any:
        """Run a statement and return the first column of its first row; None if it has none."""
        async with self.connection() as connection:
            return await connection.fetchval(query, *args)

    async def execute(self, query: str, *args: object) -> str:
        """Run a statement and return its status, such as `UPDATE 1`."""
        async with self.connection() as connection:
            return await connection.execute(query, *args)

    @asynccontextmanager
    async def connection(self) -> AsyncIterator[Connection]:
        """Return a connection for the block; each statement is a transaction of its own."""
        try:
            connection = await self._acquire()
            try:
                yield connection
            finally:
                # The release of a broken connection ends it; it must not turn a committed
                # statement into an error.
                with suppress(*DRIVER_ERRORS):
                    await self._pool.release(connection, timeout=_RELEASE_SECONDS)
        except DRIVER_ERRORS as error:
            raise await self._translated(error) from error

    @asynccontextmanager
    async def transaction(self) -> AsyncIterator[Connection]:
        """Return a connection for one transaction, which an exception in the block undoes."""
        async with self.connection() as connection, connection.transaction():
            yield connection

    async def retried(self, call: Callable[[], Awaitable[T]]) -> T:
        """Return the result of a call, repeated while concurrent changes collide with it."""
        for attempt in range(_RETRIES):
            with suppress(RetryableError):
                return await call()
            await asyncio.sleep(random.uniform(0, _RETRY_SECONDS * 2**attempt))  # noqa: S311 - no secret
        return await call()

    async def _acquire(self) -> Any:
        pool = self._pool
        if pool is None:
            raise UnavailableError("this node ends")
        waits = pool.get_idle_size() == 0 and pool.get_size() == self._size
        try:
            # not the driver's own time-out, which makes a task for each call
            async with asyncio.timeout(ACQUIRE_SECONDS):
                return await pool.acquire()
        except TimeoutError:
            if waits:
                raise self._logged(UnavailableError("all connections are in use"), None) from None
            raise

    async def _translated(self, error: BaseException) -> BaseException:
        translated = unavailable(error)
        if translated is None:
            return error
        if translated.reason == READ_ONLY and self._pool is not None:
            # After a failover, a new connection may lead to the new primary.
            await self._pool.expire_connections()
        return self._logged(translated, error)

    def _logged(self, translated: UnavailableError, error: BaseException | None) -> BaseException:
        if not isinstance(translated, RetryableError):
            now = time.monotonic()
            if now - self._logged_at >= _LOG_SECONDS:
                self._logged_at = now
                log.warning(
                    "database is not available: %s",
                    translated.reason,
                    extra={"error": f"{type(error).__name__}: {error!s:.200}" if error else None},
                )
        return translated


async def open_connection(url: str, *, statement_seconds: float = STATEMENT_SECONDS) -> Any:
    """Open a connection outside of the pool. Raises `DRIVER_ERRORS`."""
    options = _options(url, statement_seconds, statement_seconds + 2.0)
    async with asyncio.timeout(CONNECT_SECONDS):
        return await asyncpg.connect(**options)


async def end_connection(connection: Any) -> None:
    """Close a connection of `open_connection`, or cut it if that takes too long."""
    try:
        await connection.close(timeout=_RELEASE_SECONDS)
    except DRIVER_ERRORS:
        connection.terminate()


@asynccontextmanager
async def start_connection(url: str, *, statement_seconds: float) -> AsyncIterator[Any]:
    """Return a connection for the start of a node. Raises `StoreError` or `ServeError`."""
    try:
        connection = await open_connection(url, statement_seconds=statement_seconds)
        try:
            yield connection
        finally:
            await end_connection(connection)
    except _START_ERRORS as error:
        raise _start_error(url, error) from None


def _options(url: str, statement_seconds: float, answer_seconds: float) -> dict[str, Any]:
    return {
        "dsn": url,
        "timeout": CONNECT_SECONDS,
        "command_timeout": answer_seconds,
        "server_settings": {
            "application_name": "workpool",
            "default_transaction_isolation": "read committed",
            "statement_timeout": f"{statement_seconds * 1000:.0f}",
            # Otherwise a node that stops in a transaction, but keeps its connections, would block
            # others at the rows that it has locked.
            "idle_in_transaction_session_timeout": f"{answer_seconds * 1000:.0f}",
            "jit": "off",  # compiling a short statement takes longer than running it
        },
    }


def _start_error(url: str, error: BaseException) -> BaseException:
    """Return the error of a start that failed; a defect stays as it is.

    The driver's text about a URL may contain a part of its password.
    """
    if isinstance(error, asyncpg.ClientConfigurationError | ValueError):
        return ServeError(f"store {shown_url(url)}: the URL cannot be read")
    translated = unavailable(error)
    if translated is None:
        return error
    return StoreError(f"store {shown_url(url)}: {translated.reason}")


async def _keep(_connection: Any) -> None:
    """Reset nothing when a connection returns, which would be a statement after each call.

    No call changes a setting, listens, or takes a lock beyond its transaction.
    """
