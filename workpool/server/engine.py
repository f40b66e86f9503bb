"""The interface between the HTTP routes and the state of the control plane.

`index_engine` implements it on the index in memory with a store behind it, and `postgres` on a
database that several control planes share. See workpool/docs/control-plane.md, "Layers".
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

from workpool.wire.protocol import SESSION, TTL_DEFAULT_SECONDS

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from workpool.server.conversation import EventFilter, StoredEvent
    from workpool.server.environments import Environment
    from workpool.server.history import Record
    from workpool.server.pagination import ListPage
    from workpool.server.parsing.creation_requests import NewEnvironment, NewSession
    from workpool.server.parsing.request_values import ItemFilter, ListPageRequest
    from workpool.server.queue.long_polls import Poll
    from workpool.server.queue.work_queue import WorkQueueStats
    from workpool.server.stored_item import Item
    from workpool.server.stored_session import SessionFilter, SessionView


class ControlPlaneEngine(Protocol):
    """The calls of the protocol as coroutines, independent of HTTP.

    Each result survives a crash when the call returns, and so does each state that a refusal with
    409 shows. Every call may raise `APIError`, which is the answer, and `StoreError`.

    Attributes:
        signing_key: The key that signs the tokens of items; set by `open`.
    """

    signing_key: bytes

    async def open(self) -> None:
        """Open the store. Raises `ServeError`."""

    async def close(self) -> None:
        """Close everything that `open` opened, if anything is open."""

    async def wait_for_failure(self) -> None:
        """Wait until the store fails permanently; then raise `StoreError`."""

    def end_waiting_calls(self) -> None:
        """End all waits of polls and streams, and forbid new waits, because the server closes."""

    async def require_self_hosted_environment(self, environment_id: str) -> None:
        """Raise a 404 for an unknown environment, and a 400 for one that is not `self_hosted`."""

    async def get_environment(self, environment_id: str) -> Environment:
        """Return an environment; raises a 404 for an unknown id."""

    async def list_environments(
        self, place: ListPageRequest, allowed_ids: frozenset[str] | None
    ) -> ListPage[Environment]:
        """Return a page of environments: those in `allowed_ids`, or all if that is None."""

    async def create_environment(self, wanted: NewEnvironment) -> Environment:
        """Create a `self_hosted` environment."""

    async def enqueue(
        self,
        environment_id: str,
        *,
        count: int = 1,
        metadata: Mapping[str, str] | None = None,
        work_type: str = SESSION,
        session_id: str | None = None,
        script: object = None,
    ) -> Sequence[Item]:
        """Create items, each with a new session unless `session_id` names an existing one."""

    async def create_session(self, wanted: NewSession) -> SessionView:
        """Create a session, and queue its first work item."""

    async def long_poll(
        self, environment_id: str, poll: Poll, gone: Callable[[], bool]
    ) -> Item | None:
        """Deliver an item to a poll, which waits up to `block_ms`; return None if no item came.

        `gone` returns whether the client has disconnected. If so, the client gets no item, and a
        delivery to this client is withdrawn.
        """

    async def ack_item(
        self, environment_id: str, work_id: str, worker_id: str | None = None
    ) -> Item:
        """Acknowledge an item."""

    async def heartbeat(
        self,
        environment_id: str,
        work_id: str,
        expected: str | None = None,
        ttl_seconds: int = TTL_DEFAULT_SECONDS,
        worker_id: str | None = None,
        *,
        compare_on_stop: bool = True,
    ) -> Item:
        """Extend the lease of an item, if `state_machine.extend_lease` allows the heartbeat."""

    async def stop_item(
        self,
        environment_id: str,
        work_id: str,
        worker_id: str | None = None,
        *,
        force: bool = False,
        refused: frozenset[tuple[bool, str]] = frozenset(),
    ) -> Item:
        """Stop an item. Raises a 409 if the pair (`force`, the item's state) is in `refused`."""

    async def update_metadata(
        self,
        environment_id: str,
        work_id: str,
        patch: Mapping[str, str | None],
        worker_id: str | None = None,
    ) -> Item:
        """Merge a patch into an item's metadata."""

    async def get_item(self, environment_id: str, work_id: str) -> Item:
        """Return an item; raises a 404 for an unknown id."""

    async def list_items(
        self, environment_id: str, place: ListPageRequest, wanted: ItemFilter | None = None
    ) -> ListPage[Item]:
        """Return a page of the items that match the filter `wanted`, in the filter's order."""

    async def queue_stats(self, environment_id: str) -> WorkQueueStats:
        """Return the statistics of an environment's queue."""

    async def get_session(self, session_id: str) -> SessionView:
        """Return a session; raises a 404 for an unknown id."""

    async def list_sessions(
        self, place: ListPageRequest, wanted: SessionFilter
    ) -> ListPage[SessionView]:
        """Return a page of the sessions that match the filter `wanted`."""

    async def archive_session(self, session_id: str) -> SessionView:
        """Archive a session: terminate it, and request the stop of its work item."""

    async def send_events(
        self,
        session_id: str,
        new_events: Sequence[Mapping[str, Any]],
        *,
        messages_bring_work: bool = False,
    ) -> Sequence[StoredEvent]:
        """Append a client's events to a session: all of them, or none if one is refused.

        `messages_bring_work`: whether a message to a session whose item is stopped puts a new item
        into the queue.
        """

    async def emit_events(
        self, session_id: str, new_events: Sequence[Mapping[str, Any]]
    ) -> Sequence[Mapping[str, Any]]:
        """Append events of the agent to a session, and return the stored events."""

    async def list_events(
        self, session_id: str, place: ListPageRequest, wanted: EventFilter
    ) -> ListPage[StoredEvent]:
        """Return a page of a session's events that match the filter `wanted`."""

    async def count_events_to_skip(self, session_id: str, last_event_id: str | None) -> int:
        """Return how many events a stream skips: those up to and including `last_event_id`.

        If `last_event_id` is None, the stream skips all events so far. If no event has this id, it
        skips none.
        """

    async def wait_for_events(
        self, session_id: str, place: int, seconds: float
    ) -> Sequence[StoredEvent] | None:
        """Wait until a session has more than `place` events; return the events after these.

        Returns no events if none was appended within `seconds`. Returns None if no event can
        follow, because the session was deleted or the control plane closes.
        """

    async def read_history(self) -> Sequence[Record]:
        """Return the recorded history of all items, the oldest record first."""
