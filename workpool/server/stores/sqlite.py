"""A store in a SQLite file, which one thread writes; saved changes survive kill -9.

All changes during a commit go into the next one, so that many calls share one sync to disk. The
file is locked while open, since two servers on one file would each rely on their own memory. After
a failure the store accepts nothing, since memory and file differ.
"""

from __future__ import annotations

import asyncio
import logging
import os
import secrets
import sqlite3
import threading
from collections import deque
from contextlib import closing, suppress
from importlib.resources import files
from typing import TYPE_CHECKING, Any, Final

from workpool.server.api_errors import StoreError
from workpool.server.stores.sqlite_rows import TABLES, DeletedRow
from workpool.server.stores.store import StoreContents

if TYPE_CHECKING:
    from collections.abc import Sequence
    from contextlib import AbstractContextManager
    from pathlib import Path

    from workpool.server.conversation import StoredEvent
    from workpool.server.environments import Environment
    from workpool.server.stored_item import Item
    from workpool.server.stored_session import StoredSession
    from workpool.server.stores.sqlite_rows import Row

log = logging.getLogger("workpool.server")

SCHEMAS: Final = ("schema.sql", "schema_2.sql", "schema_3.sql")
"""The upgrades of a file, from each version to the next; a new file gets all of them."""
SCHEMA_VERSION: Final = len(SCHEMAS)
_LOCK_SECONDS: Final = 1.0
_FILE_MODE: Final = 0o600
_NO_FILES: Final = ("", ":memory:")


class SqliteStore:
    """Environments, items, sessions and their events in one SQLite file, created if missing.

    `open`, `wait_until_durable` and `close` belong to one event loop; only the writer's thread uses
    the file.
    """

    def __init__(self, path: str | Path) -> None:
        self._path = path
        self._thread: threading.Thread | None = None
        # The lock must be reentrant: code in a block of `transaction` holds the lock, and queues
        # rows with methods that acquire it again.
        self._changed = threading.Condition(threading.RLock())
        # `_changed` is a condition; its lock protects the next three attributes. `_unsaved` has
        # only the newest version of each row. `_saved` is the number of changes so far.
        self._unsaved: dict[str, Row | DeletedRow] = {}
        self._saved = 0
        self._closing = False
        # Only the event loop uses the following attributes.
        self._committed = 0
        self._waiting: deque[tuple[int, asyncio.Future[None]]] = deque()
        self._failure = ""
        self._failed = asyncio.Event()

    async def open(self) -> StoreContents:
        """Lock the file, create or check its tables, and read all rows. Raises `StoreError`."""
        loop = asyncio.get_running_loop()
        opened: asyncio.Future[StoreContents] = loop.create_future()
        self._thread = threading.Thread(
            target=self._run_writer, args=(loop, opened), name="workpool-store", daemon=True
        )
        self._thread.start()
        return await opened

    def transaction(self) -> AbstractContextManager[object]:
        """Return a context whose changes are one transaction; the block must not await.

        The writer takes no changes meanwhile: the context is the lock, which is reentrant.
        """
        return self._changed

    def save_item(self, item: Item) -> None:
        """Schedule the saving of a new version of an item; returns at once."""
        self._enqueue_rows(item)

    def save_session(self, session: StoredSession) -> None:
        """Schedule the saving of a new version of a session; returns at once."""
        self._enqueue_rows(session)

    def save_environment(self, environment: Environment) -> None:
        """Schedule the saving of a new environment; returns at once."""
        self._enqueue_rows(environment)

    def save_events(self, events: Sequence[StoredEvent]) -> None:
        """Schedule the saving of new events in one transaction; returns at once."""
        self._enqueue_rows(*events)

    def delete_rows(self, rows: Sequence[Row]) -> None:
        """Schedule the deletion of items, sessions and events; returns at once."""
        if rows:
            self._enqueue_rows(*(DeletedRow(type(row), row.id) for row in rows))

    async def wait_until_durable(self) -> None:
        """Wait until all changes made before this call are on disk. Raises `StoreError`."""
        if self._failure:
            raise StoreError(self._failure)
        if self._committed < self._saved:
            future = asyncio.get_running_loop().create_future()
            self._waiting.append((self._saved, future))
            await future

    async def wait_for_failure(self) -> None:
        """Wait until a write has failed; then raise `StoreError`."""
        await self._failed.wait()
        raise StoreError(self._failure)

    async def close(self) -> None:
        """Write the remaining changes and unlock the file.

        May be called twice, or without `open`.
        """
        with self._changed:
            self._closing = True
            self._changed.notify()
        if self._thread is not None:
            await asyncio.to_thread(self._thread.join)

    def _enqueue_rows(self, *rows: Row | DeletedRow) -> None:
        with self._changed:
            self._unsaved.update((row.id, row) for row in rows)
            self._saved += 1
            self._changed.notify()

    # `_run_writer` and the methods up to `_next_batch` run on the writer's thread.

    def _run_writer(
        self, loop: asyncio.AbstractEventLoop, opened: asyncio.Future[StoreContents]
    ) -> None:
        try:
            with closing(self._connect()) as connection:
                contents = self._read_contents(connection)
                if contents is None:
                    return
                loop.call_soon_threadsafe(_set_future_result, opened, contents)
                while (batch := self._next_batch()) is not None:
                    rows, saved = batch
                    _write_rows(connection, rows)
                    loop.call_soon_threadsafe(self._on_batch_committed, saved)
        except Exception as error:  # noqa: BLE001 - whatever ends this thread is raised on the loop
            problem = str(error)
            if not isinstance(error, sqlite3.Error | StoreError):
                problem = f"{type(error).__name__}: {problem}"
            loop.call_soon_threadsafe(
                self._on_writer_failed, f"store {self._path}: {problem}", opened
            )

    def _connect(self) -> sqlite3.Connection:
        if str(self._path) not in _NO_FILES:
            # Create the file here, so that other users cannot read it. SQLite creates its further
            # files with the same mode. An error is suppressed, because SQLite then fails with a
            # better message.
            with suppress(OSError):
                os.close(os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, _FILE_MODE))
        connection = sqlite3.connect(self._path, timeout=_LOCK_SECONDS, isolation_level=None)
        try:
            connection.execute("PRAGMA locking_mode = EXCLUSIVE")
            connection.execute("PRAGMA journal_mode = WAL")
            connection.execute("PRAGMA synchronous = FULL")
            connection.execute("BEGIN EXCLUSIVE")
            _upgrade_schema(connection)
            connection.execute("COMMIT")
        except BaseException:
            connection.close()
            raise
        return connection

    def _read_contents(self, connection: sqlite3.Connection) -> StoreContents | None:
        """Return all rows, or None if the store closes. Raises `StoreError` for a malformed row."""
        read: list[list[Any]] = []
        for table in TABLES:
            read.append([])
            for row in connection.execute(table.read):
                if self._closing:
                    return None
                read[-1].append(table.decode_row(row))
        sessions, items, events, environments = read
        (signing_key,) = connection.execute("SELECT key FROM signing_key").fetchone()
        return StoreContents(items, sessions, events, environments, signing_key)

    def _next_batch(self) -> tuple[Sequence[Row | DeletedRow], int] | None:
        """Wait for unsaved rows; return them and the number of the last change that they contain.

        `_saved` is this number. Return None if the store closes and no rows are unsaved.
        """
        with self._changed:
            while not self._unsaved and not self._closing:
                self._changed.wait()
            if not self._unsaved:
                return None
            rows, self._unsaved = self._unsaved, {}
            return tuple(rows.values()), self._saved

    # `_on_batch_committed` and `_on_writer_failed` run on the event loop.

    def _on_batch_committed(self, saved: int) -> None:
        self._committed = saved
        while self._waiting and self._waiting[0][0] <= saved:
            _set_future_result(self._waiting.popleft()[1], None)

    def _on_writer_failed(self, message: str, opened: asyncio.Future[StoreContents]) -> None:
        self._failure = message
        self._failed.set()
        if not opened.done():
            opened.set_exception(StoreError(message))
            return
        log.critical(
            "store failed; no call can be answered anymore: %s", message, extra={"error": message}
        )
        for _, future in self._waiting:
            if not future.done():
                future.set_exception(StoreError(message))
        self._waiting.clear()


def _set_future_result(future: asyncio.Future[Any], value: object) -> None:
    if not future.done():
        future.set_result(value)


def _upgrade_schema(connection: sqlite3.Connection) -> None:
    """Upgrade the tables in the file to the schema of this release."""
    (version,) = connection.execute("PRAGMA user_version").fetchone()
    (tables,) = connection.execute("SELECT count(*) FROM sqlite_master").fetchone()
    if version > SCHEMA_VERSION:
        raise StoreError(
            f"written by a newer workpool: its schema is {version}, this one knows {SCHEMA_VERSION}"
        )
    if version == 0 and tables:
        raise StoreError("not a database of workpool: it has other tables")
    for name in SCHEMAS[version:]:
        schema = files("workpool.server.stores").joinpath(name).read_text("utf-8")
        for statement in schema.split(";\n"):
            connection.execute(statement)
    if not connection.execute("SELECT count(*) FROM signing_key").fetchone()[0]:
        connection.execute("INSERT INTO signing_key VALUES (?)", [secrets.token_bytes(32)])
    connection.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")


def _write_rows(connection: sqlite3.Connection, rows: Sequence[Row | DeletedRow]) -> None:
    """Write and delete rows in one transaction, after which the changes survive a crash."""
    connection.execute("BEGIN IMMEDIATE")
    for table in TABLES:
        connection.executemany(
            table.write, (table.encode_row(one) for one in rows if isinstance(one, table.kind))
        )
        connection.executemany(
            table.delete,
            ((one.id,) for one in rows if isinstance(one, DeletedRow) and one.kind is table.kind),
        )
    connection.execute("COMMIT")
