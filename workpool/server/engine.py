"""The calls behind the routes: the one interface between HTTP and the control plane's state.

`index_engine` implements it on the index in memory with a store behind it, and `postgres` on a
database that several control planes share. See workpool/docs/architecture.md, "The control plane".
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
    from workpool.server.parsing.request_values import ItemFilter, PageRequest
    from workpool.server.queue.long_polls import Poll
    from workpool.server.queue.work_queue import WorkQueueStats
    from workpool.server.stored_item import Item
    from workpool.server.stored_session import SessionFilter, SessionView


class Engine(Protocol):
    """The calls of the protocol without HTTP.

    Each result survives a crash when the call returns, and so does each state that a refusal with
    409 shows. Every call may raise `APIError`, which is the answer, and `StoreError`.

    Attributes:
        signing_key: The key that signs the tokens of items; set by `open`.
    """

    signing_key: bytes

    async def open(self) -> None:
        """Open the store. Raises `ServeError`."""

    async def close(self) -> None:
        """Close everything that `open` opened; without effect if nothing is open."""

    async def wait_for_failure(self) -> None:
        """Wait until nothing can be saved before a restart. Raises `StoreError`."""

    def end_waits(self) -> None:
        """End all long polls and streams, and let no further one wait: the server closes."""

    async def check_environment(self, environment_id: str) -> None:
        """Check an environment for work calls: 404 if unknown, 400 if not `self_hosted`."""

    async def get_environment(self, environment_id: str) -> Environment:
        """Return an environment; 404 if unknown."""

    async def list_environments(
        self, place: PageRequest, limits: frozenset[str] | None
    ) -> ListPage[Environment]:
        """Return the environments in `limits` (None: all) after a place."""

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
        """Create items. `session_id`: the existing session that they belong to."""

    async def create_session(self, wanted: NewSession) -> SessionView:
        """Create a session and the work item that brings it to a worker."""

    async def long_poll(
        self, environment_id: str, poll: Poll, gone: Callable[[], bool]
    ) -> Item | None:
        """Deliver an item, after a wait of up to `block_ms`; None: no item.

        `gone` returns whether the client has gone: then it receives none, and a delivery is taken
        back.
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
        """Extend an item's lease, as `state_machine.extend_lease` decides."""

    async def stop_item(
        self,
        environment_id: str,
        work_id: str,
        worker_id: str | None = None,
        *,
        force: bool = False,
        refused: frozenset[tuple[bool, str]] = frozenset(),
    ) -> Item:
        """Stop an item. `refused`: the stops, as (force, state), that are a 409 in the dialect."""

    async def update_metadata(
        self,
        environment_id: str,
        work_id: str,
        patch: Mapping[str, str | None],
        worker_id: str | None = None,
    ) -> Item:
        """Merge a patch into an item's metadata."""

    async def get_item(self, environment_id: str, work_id: str) -> Item:
        """Return an item; 404 if unknown."""

    async def list_items(
        self, environment_id: str, place: PageRequest, wanted: ItemFilter | None = None
    ) -> ListPage[Item]:
        """Return the items next to a place that `wanted` selects, in its order."""

    async def queue_stats(self, environment_id: str) -> WorkQueueStats:
        """Return the statistics of an environment's queue."""

    async def get_session(self, session_id: str) -> SessionView:
        """Return a session; 404 if unknown."""

    async def list_sessions(
        self, place: PageRequest, wanted: SessionFilter
    ) -> ListPage[SessionView]:
        """Return the wanted sessions next to a place."""

    async def archive_session(self, session_id: str) -> SessionView:
        """Archive a session: it is terminated, and its work item is asked to stop."""

    async def send_events(
        self,
        session_id: str,
        new_events: Sequence[Mapping[str, Any]],
        *,
        messages_bring_work: bool = False,
    ) -> Sequence[StoredEvent]:
        """Append all events of a client, or none.

        `messages_bring_work`: whether a message to a session whose item is stopped puts a new item
        into the queue.
        """

    async def emit_events(
        self, session_id: str, new_events: Sequence[Mapping[str, Any]]
    ) -> Sequence[Mapping[str, Any]]:
        """Append events of the agent's side of a session, and return them as stored."""

    async def list_events(
        self, session_id: str, place: PageRequest, wanted: EventFilter
    ) -> ListPage[StoredEvent]:
        """Return the wanted events of a session next to a place."""

    async def stream_position(self, session_id: str, last_event_id: str | None) -> int:
        """Return the number of events that a stream skips: those up to `last_event_id`.

        None: all events so far; the id of no event: none.
        """

    async def wait_for_events(
        self, session_id: str, place: int, seconds: float
    ) -> Sequence[StoredEvent] | None:
        """Return the next events after the first `place` ones, once there are any.

        Empty: there were none within `seconds`. None: the session was deleted or the control plane
        closes, so no event follows.
        """

    async def read_history(self) -> Sequence[Record]:
        """Return the recorded history of all items, in order."""
