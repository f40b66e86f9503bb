"""The pool of a node's database connections. Every wait for a connection is bounded.

The only module that opens a connection. Every temporary error of the driver becomes an
`UnavailableError`. No error and no log record contains the database's password.
"""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections import deque
from contextlib import asynccontextmanager
from functools import partial
from typing import TYPE_CHECKING, Any, Final, Protocol, TypeVar, cast
from urllib.parse import urlsplit

import asyncpg

from workpool.server.api_errors import ServeError, StoreError
from workpool.server.postgres.database_errors import (
    DRIVER_ERRORS,
    READ_ONLY,
    RetryableError,
    UnavailableError,
    to_unavailable_error,
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
_ANSWER_SECONDS: Final = 2.0
"""Further time after which a statement counts as lost if the database has not cancelled it."""
_START_ERRORS: Final = (*DRIVER_ERRORS, ValueError)
"""The driver's errors, and those of a URL that it cannot read."""
_RELEASE_SECONDS: Final = 2.0
_RETRIES: Final = 5
"""Repetitions of a colliding call."""
_RETRY_SECONDS: Final = 0.01
"""Longest sleep before the first repetition; it doubles with each further one."""
_LOG_SECONDS: Final = 5.0
"""Shortest time between two log records about a database that is not available."""


class Connection(Protocol):
    """A database connection; the columns of its rows are read by name or by position."""

    async def fetch(self, query: str, *args: object) -> Sequence[Any]:
        """Run a statement and return its rows."""

    async def fetchrow(self, query: str, *args: object) -> Any:
        """Run a statement and return its first row; None if there is no row."""

    async def fetchval(self, query: str, *args: object) -> Any:
        """Run a statement and return the first column of its first row; None if there is no row."""

    async def execute(self, query: str, *args: object) -> str:
        """Run a statement and return its status, such as `UPDATE 1`.

        Without arguments, `query` may be several statements.
        """

    def transaction(self) -> AbstractAsyncContextManager[object]:
        """Return a context that is a transaction, or a savepoint inside of a transaction."""


def redact_url(url: str) -> str:
    """Return the host, port and database name in a URL, without its user and password."""
    try:
        parts = urlsplit(url)
    except ValueError:
        return "postgresql://…"
    return f"postgresql://{parts.netloc.rpartition('@')[2]}{parts.path}"


class ConnectionPool:
    """The database connections of one node, which are opened on demand.

    Each method takes a connection, runs one statement in a transaction of its own, and returns once
    the transaction is committed. A statement that the database rolled back because of a concurrent
    change is repeated a few times. Raises `UnavailableError` if the database is not available now.

    The driver's own pool takes twice the time of a short statement. This pool is faster because it
    has no tasks and no proxies, and does not reset a connection after use, so no call may change a
    setting, listen, or take a lock that outlives its transaction. A connection whose call was
    cancelled, or has had no answer, is not used again.

    Args:
        url: The database, `postgresql://USER:PASSWORD@HOST:PORT/NAME?PARAMETER=VALUE`.
        size: Largest number of connections; None: `POOL_SIZE`.
    """

    def __init__(self, url: str, *, size: int | None = None) -> None:
        self._url = url
        self._size = POOL_SIZE if size is None else size
        self._idle: list[Any] = []  # a stack: the last used connection is taken first
        self._used: set[Any] = set()
        self._opening = 0
        self._expired: set[Any] = set()  # connections in use, to be closed after their call
        self._waiting: deque[asyncio.Future[None]] = deque()
        self._closed = True
        self._logged_at = float("-inf")

    def __repr__(self) -> str:
        return f"ConnectionPool({redact_url(self._url)!r})"

    async def open(self) -> None:
        """Open the first connection. Raises `StoreError` or `ServeError`."""
        try:
            self._idle.append(await open_connection(self._url))
        except _START_ERRORS as error:
            raise _translate_start_error(self._url, error) from None
        self._closed = False

    async def close(self) -> None:
        """Close all connections; may be called twice, or without `open`."""
        self._closed = True
        self._wake_waiting_calls(len(self._waiting))
        for connection in self._used:
            connection.terminate()
        while self._idle:
            await end_connection(self._idle.pop())

    async def fetch(self, query: str, *args: object) -> Sequence[Any]:
        """Run a statement and return its rows."""
        return cast("Sequence[Any]", await self._run_statement("fetch", query, args))

    async def fetchrow(self, query: str, *args: object) -> Any:
        """Run a statement and return its first row; None if there is no row."""
        return await self._run_statement("fetchrow", query, args)

    async def fetchval(self, query: str, *args: object) -> Any:
        """Run a statement and return the first column of its first row; None if there is no row."""
        return await self._run_statement("fetchval", query, args)

    async def execute(self, query: str, *args: object) -> str:
        """Run a statement and return its status, such as `UPDATE 1`."""
        return cast("str", await self._run_statement("execute", query, args))

    async def _run_statement(self, method: str, query: str, args: Sequence[object]) -> Any:
        try:
            return await self._attempt_statement(method, query, args)
        except RetryableError:
            # Only a statement that collided, which is rare, has the cost of the repetition.
            attempt = partial(self._attempt_statement, method, query, args)
        return await self.retry_colliding_call(attempt, collisions=1)

    async def _attempt_statement(self, method: str, query: str, args: Sequence[object]) -> Any:
        connection = self._take_idle_connection() or await self._acquire_connection()
        try:
            result = await getattr(connection, method)(query, *args)
        except BaseException as error:
            self._release_connection(connection, error)
            self._raise_if_unavailable(error)
            raise
        self._release_connection(connection)
        return result

    @asynccontextmanager
    async def transaction(self) -> AsyncIterator[Connection]:
        """Return a context with a connection in a transaction; an exception rolls it back."""
        connection = self._take_idle_connection() or await self._acquire_connection()
        try:
            await connection.execute("BEGIN")
            try:
                yield connection
            except Exception:
                if not connection.is_closed():
                    await connection.execute("ROLLBACK")
                raise
            await _commit_transaction(connection)
        except BaseException as error:
            self._release_connection(connection, error)
            self._raise_if_unavailable(error)
            raise
        self._release_connection(connection)

    async def retry_colliding_call(
        self, call: Callable[[], Awaitable[T]], *, collisions: int = 0
    ) -> T:
        """Run `call`, and repeat it a few times while it raises `RetryableError`.

        `collisions`: attempts of the same call that have already raised `RetryableError`.
        """
        while True:
            if collisions > 0:
                ceiling = _RETRY_SECONDS * 2 ** (collisions - 1)
                await asyncio.sleep(random.uniform(0, ceiling))  # noqa: S311 - no secret
            try:
                return await call()
            except RetryableError:
                if collisions == _RETRIES:
                    raise
            collisions += 1

    def _take_idle_connection(self) -> Any:
        """Return an idle connection; None if there is none."""
        while self._idle:
            connection = self._idle.pop()
            if not connection.is_closed():
                self._used.add(connection)
                return connection
        return None

    async def _acquire_connection(self) -> Any:
        """Return an idle or new connection, or wait for one. Raises `UnavailableError`."""
        loop = asyncio.get_running_loop()
        end = loop.time() + ACQUIRE_SECONDS
        while not self._closed:
            connection = self._take_idle_connection()
            if connection is not None:
                return connection
            if len(self._used) + self._opening < self._size:
                return await self._open_pooled_connection()
            await self._wait_for_free_connection(end - loop.time())
        raise UnavailableError("this node ends")

    async def _open_pooled_connection(self) -> Any:
        self._opening += 1
        try:
            connection = await open_connection(self._url)
        except DRIVER_ERRORS as error:
            self._wake_waiting_calls()
            self._raise_if_unavailable(error)
            raise
        except BaseException:
            self._wake_waiting_calls()
            raise
        finally:
            self._opening -= 1
        self._used.add(connection)
        return connection

    async def _wait_for_free_connection(self, seconds: float) -> None:
        """Wait until another call frees a connection. Raises `UnavailableError`."""
        waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append(waiter)
        try:
            async with asyncio.timeout(seconds):
                await waiter
        except TimeoutError:
            self._forward_unused_wake_up(waiter)
            refusal = UnavailableError("all connections are in use")
            self._log_unavailability(refusal, None)
            raise refusal from None
        except asyncio.CancelledError:
            self._forward_unused_wake_up(waiter)
            raise

    def _forward_unused_wake_up(self, waiter: asyncio.Future[None]) -> None:
        """Wake the next waiting call if `waiter` was woken, but its call takes no connection."""
        if waiter.done() and not waiter.cancelled():
            self._wake_waiting_calls()

    def _release_connection(self, connection: Any, error: BaseException | None = None) -> None:
        """Make a connection idle, or terminate it if its state is unknown after an error."""
        self._used.discard(connection)
        is_reusable = (
            not self._closed
            and connection not in self._expired
            and _has_no_open_statement(error)
            and not connection.is_closed()
            and not connection.is_in_transaction()
        )
        self._expired.discard(connection)
        if is_reusable:
            self._idle.append(connection)
        else:
            connection.terminate()  # the database then cancels any running statement
        self._wake_waiting_calls()

    def _wake_waiting_calls(self, count: int = 1) -> None:
        while count > 0 and self._waiting:
            waiter = self._waiting.popleft()
            if not waiter.done():
                waiter.set_result(None)
                count -= 1

    def _raise_if_unavailable(self, error: BaseException) -> None:
        """Raise `UnavailableError` if a driver's error is temporary; else return."""
        if not isinstance(error, DRIVER_ERRORS):
            return
        refusal = to_unavailable_error(error)
        if refusal is None:
            return
        if refusal.reason == READ_ONLY:
            # After a failover, the server of the current connections may be a standby: use none of
            # them again.
            self._expired |= self._used
            while self._idle:
                self._idle.pop().terminate()
        self._log_unavailability(refusal, error)
        raise refusal from error

    def _log_unavailability(self, refusal: UnavailableError, error: BaseException | None) -> None:
        now = time.monotonic()
        if not isinstance(refusal, RetryableError) and now - self._logged_at >= _LOG_SECONDS:
            self._logged_at = now
            log.warning(
                "database is not available: %s",
                refusal.reason,
                extra={"error": f"{type(error).__name__}: {error!s:.200}" if error else None},
            )


async def _commit_transaction(connection: Any) -> None:
    if await connection.execute("COMMIT") != "COMMIT":
        raise RuntimeError("a block went on after a failed statement, so nothing was committed")


def _has_no_open_statement(error: BaseException | None) -> bool:
    """Return whether no statement is running after a call that raised `error` (None: no error)."""
    of_driver = isinstance(error, DRIVER_ERRORS) and not isinstance(error, asyncpg.PostgresError)
    return error is None or (isinstance(error, Exception) and not of_driver)


async def open_connection(url: str, *, statement_seconds: float | None = None) -> Any:
    """Open a connection outside of the pool. Raises `DRIVER_ERRORS`.

    `statement_seconds`: None: `STATEMENT_SECONDS`.
    """
    seconds = STATEMENT_SECONDS if statement_seconds is None else statement_seconds
    options = _make_connection_options(url, seconds, seconds + _ANSWER_SECONDS)
    async with asyncio.timeout(CONNECT_SECONDS):
        return await asyncpg.connect(**options)


async def end_connection(connection: Any) -> None:
    """Close a connection, or terminate it if closing takes too long."""
    try:
        # The driver's own limit for `close` excludes the time in which a statement is cancelled.
        async with asyncio.timeout(_RELEASE_SECONDS):
            await connection.close()
    except DRIVER_ERRORS:
        connection.terminate()


@asynccontextmanager
async def start_connection(url: str, *, statement_seconds: float) -> AsyncIterator[Any]:
    """Return a context with one connection, for the start of a node. Raises `ServeError`."""
    try:
        connection = await open_connection(url, statement_seconds=statement_seconds)
        try:
            yield connection
        finally:
            await end_connection(connection)
    except _START_ERRORS as error:
        raise _translate_start_error(url, error) from None


def _make_connection_options(
    url: str, statement_seconds: float, answer_seconds: float
) -> dict[str, Any]:
    return {
        "dsn": url,
        "timeout": CONNECT_SECONDS,
        "command_timeout": answer_seconds,
        "server_settings": {
            "application_name": "workpool",
            "default_transaction_isolation": "read committed",
            "statement_timeout": f"{statement_seconds * 1000:.0f}",
            # Without this limit, a node that hangs in a transaction could block other transactions
            # forever.
            "idle_in_transaction_session_timeout": f"{answer_seconds * 1000:.0f}",
            # With this setting, the database cancels the statement of a client that has
            # disconnected.
            "client_connection_check_interval": "1000",
            "jit": "off",  # off: JIT compilation takes longer than a short statement
        },
    }


def _translate_start_error(url: str, error: BaseException) -> BaseException:
    """Convert an error at a node's start to a `ServeError`; return an unexpected error unchanged.

    The driver's text about a URL may contain a part of its password.
    """
    if isinstance(error, asyncpg.ClientConfigurationError | ValueError):
        return ServeError(f"store {redact_url(url)}: the URL cannot be read")
    translated = to_unavailable_error(error)
    if translated is None:
        return error
    return StoreError(f"store {redact_url(url)}: {translated.reason}")
