"""The engine for the memory and SQLite stores, on top of `Operations`.

Each call returns once the store has saved its changes. One process has the whole state. See
workpool/docs/control-plane.md, "Layers".
"""

from __future__ import annotations

import asyncio
from http import HTTPStatus
from itertools import islice
from typing import TYPE_CHECKING, Any, Final, ParamSpec, TypeVar

from workpool.server.api_errors import APIError
from workpool.server.conversation import EVERY_EVENT
from workpool.server.pagination import make_page
from workpool.wire.protocol import SESSION, TTL_DEFAULT_SECONDS

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Mapping, Sequence

    from workpool.server.conversation import EventFilter, StoredEvent
    from workpool.server.environments import Environment
    from workpool.server.history import Record
    from workpool.server.operations import Operations
    from workpool.server.pagination import ListPage
    from workpool.server.parsing.creation_requests import NewEnvironment, NewSession
    from workpool.server.parsing.request_values import ItemFilter, ListPageRequest
    from workpool.server.queue.long_polls import Poll
    from workpool.server.queue.work_queue import WorkQueueStats
    from workpool.server.stored_item import Item
    from workpool.server.stored_session import SessionFilter, SessionView, StoredSession

SCAN_ROWS: Final = 500
"""After this many rows of a filtered list, other calls run."""
FOLLOW_MAX: Final = 100
"""Largest number of events that one wait of a stream returns."""

P = ParamSpec("P")
T = TypeVar("T")


class MemoryIndexEngine:
    """The calls of `Operations`, each of which returns once its changes survive a crash.

    Most methods return the coroutine of `_call_and_wait_until_durable` instead of awaiting it: a
    second coroutine would slow down the most frequent calls.
    """

    def __init__(self, operations: Operations) -> None:
        self._operations = operations
        self.signing_key = b""

    async def open(self) -> None:
        """Open the store and read its content. Raises `StoreError`."""
        await self._operations.open()
        self.signing_key = self._operations.signing_key

    async def close(self) -> None:
        """Close the store."""
        await self._operations.close()

    async def wait_for_failure(self) -> None:
        """Wait until the store can no longer save anything; then raise `StoreError`."""
        await self._operations.wait_for_failure()

    def end_waiting_calls(self) -> None:
        """End all waits of polls and streams, and forbid new waits, because the server closes."""
        self._operations.end_waiting_calls()

    async def _call_and_wait_until_durable(
        self, call: Callable[P, T], /, *arguments: P.args, **options: P.kwargs
    ) -> T:
        """Run `call`, wait until all changes so far survive a crash, and return its result.

        A 409 waits too, since it can show a change that an earlier call has made.
        """
        try:
            result = call(*arguments, **options)
        except APIError as refusal:
            if refusal.status == HTTPStatus.CONFLICT:
                await self._operations.wait_until_durable()
            raise
        await self._operations.wait_until_durable()
        return result

    async def require_self_hosted_environment(self, environment_id: str) -> None:
        """Raise a 404 for an unknown environment, and a 400 for one that is not `self_hosted`."""
        self._operations.get_queue(environment_id)

    def get_environment(self, environment_id: str) -> Coroutine[Any, Any, Environment]:
        """Return an environment; raises a 404 for an unknown id."""
        return self._call_and_wait_until_durable(self._operations.get_environment, environment_id)

    async def list_environments(
        self, place: ListPageRequest, allowed_ids: frozenset[str] | None
    ) -> ListPage[Environment]:
        """Return a page of environments: those in `allowed_ids`, or all if that is None."""
        found = [
            self._operations.get_environment(environment_id)
            for environment_id in self._operations.environment_ids()
            if environment_id > place.after
            and (allowed_ids is None or environment_id in allowed_ids)
        ]
        await self._operations.wait_until_durable()
        return make_page(found[: place.limit + 1], place.limit, backwards=False)

    def create_environment(self, wanted: NewEnvironment) -> Coroutine[Any, Any, Environment]:
        """Create a `self_hosted` environment."""
        return self._call_and_wait_until_durable(self._operations.create_environment, *wanted)

    def enqueue(
        self,
        environment_id: str,
        *,
        count: int = 1,
        metadata: Mapping[str, str] | None = None,
        work_type: str = SESSION,
        session_id: str | None = None,
        script: object = None,
    ) -> Coroutine[Any, Any, Sequence[Item]]:
        """Create items, each with a new session unless `session_id` names an existing one."""
        return self._call_and_wait_until_durable(
            self._operations.enqueue,
            environment_id,
            count=count,
            metadata=metadata,
            work_type=work_type,
            session_id=session_id,
            script=script,
        )

    async def create_session(self, wanted: NewSession) -> SessionView:
        """Create a session, and queue its first work item."""
        view = self._make_session_view(*self._operations.create_session(wanted))
        await self._operations.wait_until_durable()
        return view

    async def long_poll(
        self, environment_id: str, poll: Poll, gone: Callable[[], bool]
    ) -> Item | None:
        """Deliver an item to a poll, which waits up to `block_ms`; return None if no item came."""
        item = await self._operations.long_poll(environment_id, poll, gone)
        if item is None:
            await self._operations.wait_until_durable()
            return None
        delivered = False
        try:
            await self._operations.wait_until_durable()
            delivered = not gone()
        finally:  # The client may have disconnected while the store saved the delivery.
            if not delivered:
                self._operations.withdraw_delivery(item)
        return item if delivered else None

    def ack_item(
        self, environment_id: str, work_id: str, worker_id: str | None = None
    ) -> Coroutine[Any, Any, Item]:
        """Acknowledge an item."""
        return self._call_and_wait_until_durable(
            self._operations.ack_item, environment_id, work_id, worker_id
        )

    def heartbeat(
        self,
        environment_id: str,
        work_id: str,
        expected: str | None = None,
        ttl_seconds: int = TTL_DEFAULT_SECONDS,
        worker_id: str | None = None,
        *,
        compare_on_stop: bool = True,
    ) -> Coroutine[Any, Any, Item]:
        """Extend the lease of an item, if `state_machine.extend_lease` allows the heartbeat."""
        return self._call_and_wait_until_durable(
            self._operations.heartbeat,
            environment_id,
            work_id,
            expected,
            ttl_seconds,
            worker_id,
            compare_on_stop=compare_on_stop,
        )

    def stop_item(
        self,
        environment_id: str,
        work_id: str,
        worker_id: str | None = None,
        *,
        force: bool = False,
        refused: frozenset[tuple[bool, str]] = frozenset(),
    ) -> Coroutine[Any, Any, Item]:
        """Stop an item. Raises a 409 if the pair (`force`, the item's state) is in `refused`."""
        return self._call_and_wait_until_durable(
            self._operations.stop_item,
            environment_id,
            work_id,
            worker_id,
            force=force,
            refused=refused,
        )

    def update_metadata(
        self,
        environment_id: str,
        work_id: str,
        patch: Mapping[str, str | None],
        worker_id: str | None = None,
    ) -> Coroutine[Any, Any, Item]:
        """Merge a patch into an item's metadata."""
        return self._call_and_wait_until_durable(
            self._operations.update_metadata, environment_id, work_id, patch, worker_id
        )

    def get_item(self, environment_id: str, work_id: str) -> Coroutine[Any, Any, Item]:
        """Return an item; raises a 404 for an unknown id."""
        return self._call_and_wait_until_durable(self._operations.get_item, environment_id, work_id)

    def list_items(
        self, environment_id: str, place: ListPageRequest, wanted: ItemFilter | None = None
    ) -> Coroutine[Any, Any, ListPage[Item]]:
        """Return a page of the items that match the filter `wanted`, in the filter's order."""
        limit, after, before = place
        if wanted is None:
            return self._call_and_wait_until_durable(
                self._operations.list_items, environment_id, limit, after=after, before=before
            )
        return self._call_and_wait_until_durable(
            self._operations.search_items, environment_id, wanted, limit, after=after, before=before
        )

    def queue_stats(self, environment_id: str) -> Coroutine[Any, Any, WorkQueueStats]:
        """Return the statistics of an environment's queue."""
        return self._call_and_wait_until_durable(self._operations.queue_stats, environment_id)

    async def get_session(self, session_id: str) -> SessionView:
        """Return a session; raises a 404 for an unknown id."""
        view = self._make_session_view(*self._operations.get_session(session_id))
        await self._operations.wait_until_durable()
        return view

    async def list_sessions(
        self, place: ListPageRequest, wanted: SessionFilter
    ) -> ListPage[SessionView]:
        """Return a page of the sessions that match the filter `wanted`."""
        limit, after, before = place
        backwards = wanted.newest_first or before is not None
        found: list[SessionView] = []
        last: str | None = ""
        while last is not None and len(found) <= limit:
            last = None
            walk = self._operations.iterate_sessions(
                after=after, before=before, newest_first=wanted.newest_first
            )
            for each in islice(walk, SCAN_ROWS):
                # Make the session's `SessionView` before the next await, during which another call
                # may delete the session.
                view = self._make_session_view(*each)
                last = view.id
                if wanted.matches(view):
                    found.append(view)
                if len(found) > limit:
                    break
            if backwards:
                before = last
            else:
                after = last or ""
            await asyncio.sleep(0)
        if backwards and not wanted.newest_first:
            found.reverse()
        await self._operations.wait_until_durable()
        return make_page(found, limit, backwards=backwards, newest_first=wanted.newest_first)

    async def archive_session(self, session_id: str) -> SessionView:
        """Archive a session: terminate it, and request the stop of its work item."""
        view = self._make_session_view(*self._operations.archive_session(session_id))
        await self._operations.wait_until_durable()
        return view

    def send_events(
        self,
        session_id: str,
        new_events: Sequence[Mapping[str, Any]],
        *,
        messages_bring_work: bool = False,
    ) -> Coroutine[Any, Any, Sequence[StoredEvent]]:
        """Append a client's events to a session: all of them, or none if one is refused."""
        return self._call_and_wait_until_durable(
            self._operations.send_events,
            session_id,
            new_events,
            messages_bring_work=messages_bring_work,
        )

    def emit_events(
        self, session_id: str, new_events: Sequence[Mapping[str, Any]]
    ) -> Coroutine[Any, Any, Sequence[Mapping[str, Any]]]:
        """Append events of the agent to a session, and return the stored events."""
        return self._call_and_wait_until_durable(
            self._operations.emit_events, session_id, new_events
        )

    async def list_events(
        self, session_id: str, place: ListPageRequest, wanted: EventFilter = EVERY_EVENT
    ) -> ListPage[StoredEvent]:
        """Return a page of a session's events that match the filter `wanted`."""
        conversation = self._operations.sessions.get_conversation(session_id)
        found = conversation.list_events(
            place.limit + 1, after=place.after, before=place.before, wanted=wanted
        )
        await self._operations.wait_until_durable()
        return make_page(
            found,
            place.limit,
            backwards=place.before is not None,
            newest_first=wanted.newest_first,
        )

    async def count_events_to_skip(self, session_id: str, last_event_id: str | None) -> int:
        """Return how many events a stream skips: those up to and including `last_event_id`."""
        conversation = self._operations.sessions.get_conversation(session_id)
        if last_event_id is None:
            return len(conversation.events)
        return conversation.find_position_after_event(last_event_id)

    async def wait_for_events(
        self, session_id: str, place: int, seconds: float
    ) -> Sequence[StoredEvent] | None:
        """Wait until a session has more than `place` events; return the events after these."""
        sessions = self._operations.sessions
        if not await sessions.wait_for_events(session_id, place, seconds):
            return None
        events = sessions.get_conversation(session_id).events[place : place + FOLLOW_MAX]
        await self._operations.wait_until_durable()
        return events

    async def read_history(self) -> Sequence[Record]:
        """Return the recorded history of all items, the oldest record first."""
        return tuple(self._operations.history)

    def _make_session_view(self, session: StoredSession, item: Item) -> SessionView:
        return self._operations.sessions.make_session_view(session, item)
