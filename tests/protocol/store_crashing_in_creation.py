"""Program that creates a session on SQLite and kills itself before it saves the session's events.

Usage: `store_crashing_in_creation.py FILE`.
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import time
from typing import TYPE_CHECKING, NoReturn

from tests.protocol.sqlite_control_plane import ENV
from workpool.server import SqliteStore
from workpool.server.operations import Operations

if TYPE_CHECKING:
    from collections.abc import Sequence

    from workpool.server.conversation import StoredEvent

WRITER_SECONDS = 0.5
"""Seconds in which the writer thread would commit the item, if it could without its events.

On a slow machine, the test may miss a defect, but it does not fail without a defect.
"""


class CrashingStore(SqliteStore):
    """A store that kills its process between the save of an item and the save of its events."""

    def save_events(self, events: Sequence[StoredEvent]) -> NoReturn:
        """Give the writer thread time to commit the item alone; then kill the process."""
        time.sleep(WRITER_SECONDS)
        os.kill(os.getpid(), signal.SIGKILL)
        raise AssertionError(events)


async def create_session(path: str) -> None:
    operations = Operations((ENV,), store=CrashingStore(path))
    await operations.open()
    operations.enqueue(ENV, script=[{"name": "bash", "input": {"command": "true"}}])


if __name__ == "__main__":
    asyncio.run(create_session(sys.argv[1]))
