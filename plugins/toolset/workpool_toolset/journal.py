"""What this machine knows of a session's calls: begun, and with which result. Survives a crash.

A row is committed to disk *before* a call is executed, and its result before it is sent. So after
a crash each call is one of three: never begun (run it), begun without a result (nobody knows how
far it got: say so, never run it again), or with a result (send it, however often).
The primary key also keeps two workers of one machine apart: of a worker that slept through its
lease and the one that took over, only one can begin a call.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import sqlite3
import threading
from typing import TYPE_CHECKING, Final, Literal, TypeVar

from workpool_toolset.results import Result

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

T = TypeVar("T")

BUSY_SECONDS: Final = 5.0
_SCHEMA: Final = """
CREATE TABLE IF NOT EXISTS calls (
    id TEXT PRIMARY KEY,
    result TEXT            -- JSON; NULL until the call has ended, and once the result was seen back
) STRICT
"""


class Journal:
    """One session's journal, in a file of its own. Open it with `async with`.

    Attributes:
        new: Whether the file was made by this opening.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lock = threading.Lock()  # a cancelled call's thread may still be at work
        self._database: sqlite3.Connection | None = None
        self.new = False

    async def __aenter__(self) -> Journal:
        self.new = not self._path.exists()
        await asyncio.to_thread(self._open)
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._do(lambda database: database.close())

    async def begin(self, call: str) -> Result | Literal["new", "begun"]:
        """Note that a call is about to be executed; "new" is the leave to execute it.

        Returns:
            "new", or, when it was begun before, its result, or "begun" when there is none.
        """

        def ask(database: sqlite3.Connection) -> Result | Literal["new", "begun"]:
            done = database.execute("INSERT OR IGNORE INTO calls (id) VALUES (?)", (call,))
            if done.rowcount:
                return "new"
            [text] = database.execute("SELECT result FROM calls WHERE id = ?", (call,)).fetchone()
            return "begun" if text is None else Result(**json.loads(text))

        return await self._do(ask)

    async def finish(self, call: str, result: Result) -> None:
        """Keep a call's result until `forget`."""
        text = json.dumps({"content": result.content, "is_error": result.is_error})
        await self._do(lambda database: _keep(database, text, call))

    async def forget(self, call: str) -> None:
        """Drop the result, since the control plane has it; that the call was begun stays known."""
        await self._do(lambda database: _drop(database, call))

    async def _do(self, work: Callable[[sqlite3.Connection], T]) -> T:
        return await asyncio.to_thread(self._locked, work)

    def _locked(self, work: Callable[[sqlite3.Connection], T]) -> T:
        with self._lock:
            if self._database is None:
                raise RuntimeError("the journal is not open")
            return work(self._database)

    def _open(self) -> None:
        with self._lock, contextlib.ExitStack() as stack:
            database = sqlite3.connect(
                self._path, timeout=BUSY_SECONDS, isolation_level=None, check_same_thread=False
            )
            stack.callback(database.close)
            database.execute("PRAGMA synchronous = EXTRA")  # the directory's entry too
            database.execute(_SCHEMA)
            self._database = database
            stack.pop_all()


def _keep(database: sqlite3.Connection, text: str, call: str) -> None:
    database.execute("UPDATE calls SET result = ? WHERE id = ?", (text, call))


def _drop(database: sqlite3.Connection, call: str) -> None:
    gone = "UPDATE calls SET result = NULL WHERE id = ? AND result IS NOT NULL"
    database.execute(gone, (call,))
