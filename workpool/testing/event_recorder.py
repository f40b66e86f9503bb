"""A plugin that records all events, for tests to read and to wait for."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeVar

from workpool.hookspecs import hookimpl
from workpool.testing.bounded_wait import WAIT_SECONDS, Changes
from workpool.testing.wait_failure import names_of

if TYPE_CHECKING:
    from collections.abc import Callable

    from workpool.events import Event

E = TypeVar("E")


class Recorder:
    """Records the events of a pool. Used on the supervisor's loop.

    Attributes:
        events: All events, in their order.
    """

    def __init__(self) -> None:
        self.events: list[Event] = []
        self._changes = Changes()

    @hookimpl
    def workpool_event(self, event: Event) -> None:
        """Record an event."""
        self.events.append(event)
        self._changes.notify()

    def of(self, kind: type[E], where: Callable[[E], bool] | None = None) -> list[E]:
        """Return the events of one kind so far, in order, and only those that `where` accepts."""
        events: list[E] = [event for event in self.events if isinstance(event, kind)]
        return events if where is None else [event for event in events if where(event)]

    async def wait_for(
        self,
        kind: type[E],
        where: Callable[[E], bool] | None = None,
        *,
        count: int = 1,
        timeout: float = WAIT_SECONDS,
    ) -> E:
        """Return the `count`-th event of this kind, past or future.

        Raises:
            AssertionError: There was no such event in time.
        """
        found: list[E] = []
        seen = 0

        def enough() -> list[E] | None:
            nonlocal seen
            new, seen = self.events[seen:], len(self.events)
            found.extend(e for e in new if isinstance(e, kind) and (where is None or where(e)))
            return found if len(found) >= count else None

        await self._changes.until(
            enough, lambda: f"{count} × {kind.__name__}; there was {names_of(self.events)}", timeout
        )
        return found[count - 1]
