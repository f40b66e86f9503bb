"""Finds the sessions whose retention is over, to delete them with their items and events.

A session has ended once all of its items are stopped. It is deleted as a whole, so that each item
has its session, and each session an item.
"""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING, Final

from workpool.server.timestamps import SECOND
from workpool.wire.protocol import STOPPED

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from workpool.server.stored_item import Item
    from workpool.server.stores.sqlite_rows import Row
    from workpool.server.stores.store import StoreContents

BATCH_MAX: Final = 100
"""Largest number of sessions that one call deletes, so that no call waits for all deletions."""


class StoppedItemRetention:
    """Decides when the sessions of stopped items are deleted.

    Keeps the ids of these sessions in the order in which the items stopped.

    Args:
        seconds: Seconds for which a stopped item is kept; None: forever, and no item is recorded.
    """

    def __init__(self, seconds: float | None) -> None:
        self._time = None if seconds is None else int(seconds * SECOND)
        self._stopped: deque[tuple[int, str]] = deque()

    def add_stopped_item(self, item: Item) -> None:
        """Add an item that has just stopped."""
        if self._time is not None and item.stopped_at is not None:
            self._stopped.append((item.stopped_at, item.session_id))

    def pop_due_sessions(self, now: int) -> Iterator[str]:
        """Pop the ids of up to `BATCH_MAX` sessions that have an item whose retention is over."""
        if self._time is None:
            return
        for _ in range(BATCH_MAX):
            if not self._stopped or self._stopped[0][0] + self._time > now:
                return
            yield self._stopped.popleft()[1]

    def are_all_items_expired(self, items: Iterable[Item], now: int) -> bool:
        """Return whether all these items are stopped and their retention is over."""
        return self._time is not None and all(
            item.state == STOPPED and (item.stopped_at or 0) + self._time <= now for item in items
        )

    def split_off_ended_sessions(
        self, contents: StoreContents, now: int
    ) -> tuple[StoreContents, list[Row]]:
        """Split the sessions whose retention is over from the contents of a store.

        Return the contents without these sessions, and all rows of these sessions.
        """
        if self._time is None:
            return contents, []
        alive = {
            item.session_id
            for item in contents.items
            if not self.are_all_items_expired((item,), now)
        }
        alive |= {each.id for each in contents.sessions if each.created_at + self._time > now}
        kept = contents._replace(
            items=[item for item in contents.items if item.session_id in alive],
            sessions=[session for session in contents.sessions if session.id in alive],
            events=[event for event in contents.events if event.session_id in alive],
        )
        deleted: list[Row] = [item for item in contents.items if item.session_id not in alive]
        deleted += (session for session in contents.sessions if session.id not in alive)
        deleted += (event for event in contents.events if event.session_id not in alive)
        return kept, deleted
