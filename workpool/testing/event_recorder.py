"""A plugin that records all events, for tests to read and to wait for."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeVar

from workpool.hookspecs import hookimpl
from workpool.testing.bounded_wait import WAIT_SECONDS, BoundedCondition
from workpool.testing.wait_failure import count_event_names

if TYPE_CHECKING:
    from collections.abc import Callable

    from workpool.events import Event

E = TypeVar("E")


class Recorder:
    """A plugin that records the events of a pool.

    A recorder may be used only on the event loop of its supervisor.

    Attributes:
        events: All events, oldest first.
    """

    def __init__(self) -> None:
        self.events: list[Event] = []
        self._changes = BoundedCondition()

    @hookimpl
    def workpool_event(self, event: Event) -> None:
        """Record an event, and wake the tasks that wait for events."""
        self.events.append(event)
        self._changes.notify_all()

    def of(self, kind: type[E], where: Callable[[E], bool] | None = None) -> list[E]:
        """Return the recorded events of the class `kind`, oldest first.

        `where` returns whether to include an event; None includes all events of the class.
        """
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
        """Return the `count`-th event of the class `kind`, and wait for it if necessary.

        `where` returns whether an event counts; None counts all events of the class.

        Raises:
            AssertionError: There was no such event within `timeout` seconds.
        """
        found: list[E] = []
        seen = 0

        def find_requested_number_of_events() -> list[E] | None:
            nonlocal seen
            new, seen = self.events[seen:], len(self.events)
            found.extend(e for e in new if isinstance(e, kind) and (where is None or where(e)))
            return found if len(found) >= count else None

        await self._changes.wait_until(
            find_requested_number_of_events,
            lambda: f"{count} × {kind.__name__}; there was {count_event_names(self.events)}",
            timeout,
        )
        return found[count - 1]
