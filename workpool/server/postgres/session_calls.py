"""The calls that read one session or append to its events.

The number of its events is a session's version: an append writes on the condition that it is still
the number that was read, so the events of a session have one order on all nodes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final, NamedTuple

from workpool.server.api_errors import APIError
from workpool.server.conversation import Conversation, copy_events, extend_conversation
from workpool.server.postgres.conversation_cache import ConversationCache
from workpool.server.postgres.creation_calls import NEW_ITEM_COLUMNS, CreationCalls
from workpool.server.postgres.database_calls import (
    RECORD,
    make_change_that_ends_lease,
    remove_ended_lease,
)
from workpool.server.postgres.item_calls import LOCK_ITEM, ItemCalls, make_change_that_stops_item
from workpool.server.postgres.notifications import make_session_topic, make_work_topic
from workpool.server.postgres.row_codec import (
    VIEW_COLUMNS,
    VIEW_WIDTH,
    event_from_columns,
    events_to_columns,
    has_id_format,
    is_storable_text,
    session_view_from_row,
    to_json,
)
from workpool.server.stored_item import WORK_PREFIX, Item
from workpool.server.stored_session import TERMINATED, SessionView
from workpool.server.timestamps import parse_heartbeat_time
from workpool.wire.protocol import (
    ACTIVE,
    QUEUED,
    SESSION,
    STARTING,
    STATUS_TERMINATED,
    STOPPED,
    TTL_DEFAULT_SECONDS,
    USER_MESSAGE,
)

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from workpool.server.conversation import StoredEvent
    from workpool.server.postgres.connection_pool import Connection

EVENTS_READ_MAX: Final = 1000
"""Largest number of events that one statement reads, which has a time limit."""

_READ: Final = f"""
SELECT {VIEW_COLUMNS}, s.event_count, s.last_event_id, coalesce($2::bigint, workpool_now())
FROM sessions AS s JOIN items AS i ON i.environment_id = s.environment_id AND i.id = s.work_id
WHERE s.id = $1
"""
_LOCK: Final = "SELECT FROM sessions WHERE id = $1 FOR UPDATE"
_EVENTS: Final = f"""
SELECT id, value FROM events WHERE session_id = $1 AND seq > $2 AND seq <= $3
ORDER BY seq LIMIT {EVENTS_READ_MAX}
"""
_EVENT_ID: Final = "SELECT id FROM events WHERE session_id = $1 AND seq = $2"
_APPEND: Final = """
WITH moved AS (
    UPDATE sessions SET event_count = $2 + cardinality($8::text[]),
        last_event_id = $4, last_event_at = $5, status = $6, work_id = $7
    WHERE id = $1 AND event_count = $2::bigint AND work_id = $3
    RETURNING id
), told AS (
    INSERT INTO events (session_id, seq, id, type, processed_at, value)
    SELECT moved.id, $2 + e.place, e.id, e.type, e.processed_at, e.value
    FROM moved, unnest($8::text[], $9::text[], $10::text[], $11::text[])
        WITH ORDINALITY AS e (id, type, processed_at, value, place)
){}
SELECT count(*) FROM moved
"""
_BRINGING: Final = f"""
, created AS (
    INSERT INTO items ({NEW_ITEM_COLUMNS})
    SELECT $7, $12, moved.id, $13, '{SESSION}', 'queued', $14, {TTL_DEFAULT_SECONDS}, false
    FROM moved
)"""
_RECORDED: Final = f"""
, recorded AS (
    {RECORD.format("SELECT $13, $7, 'created', NULL, 'queued', NULL, NULL FROM moved")}
)"""
_APPENDS: Final = {
    (False, False): _APPEND.format(""),
    (False, True): _APPEND.format(""),
    (True, False): _APPEND.format(_BRINGING),
    (True, True): _APPEND.format(_BRINGING + _RECORDED),
}
"""The statement that appends events, by whether a new item comes with them and the history."""
_ARCHIVE: Final = "UPDATE sessions SET archived_at = $2 WHERE id = $1"


class _SessionRow(NamedTuple):
    """A session as read from the database.

    Attributes:
        view: The session with its latest item.
        event_count: The number of the session's events.
        last_event_id: The id of the last event; None: there are no events.
        now: The time of the read, in microseconds.
    """

    view: SessionView
    event_count: int
    last_event_id: str | None
    now: int


class StoredSessionCalls(ItemCalls, CreationCalls):
    """The calls that read one session, append to its events or archive it."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._conversations = ConversationCache()

    async def get_session(self, session_id: str) -> SessionView:
        """Return a session; raises a 404 for an unknown id."""
        return (await self._read_session(self._pool, session_id)).view

    async def send_events(
        self,
        session_id: str,
        new_events: Sequence[Mapping[str, Any]],
        *,
        messages_bring_work: bool = False,
    ) -> Sequence[StoredEvent]:
        """Append a client's events to a session: all of them, or none if one is refused."""
        has_message = any(event["type"] == USER_MESSAGE for event in new_events)

        async def attempt_to_send_events(connection: Connection) -> Sequence[StoredEvent] | None:
            read = await self._read_session(connection, session_id)
            conversation = await self._load_conversation(connection, read)
            try:
                conversation.validate_client_events(new_events)
            except APIError:
                self._conversations.put(session_id, conversation)
                raise
            brings = messages_bring_work and has_message and read.view.item.state == STOPPED
            item = self._make_next_item(read) if brings else None
            return await self._append_events(connection, read, conversation, new_events, item)

        events = await self._retry_with_row_lock(attempt_to_send_events, _LOCK, session_id)
        self._hub.announce_topic_changes(make_session_topic(session_id))
        if messages_bring_work and has_message:
            view = await self.get_session(session_id)
            self._hub.announce_topic_changes(make_work_topic(view.session.environment_id))
        return events

    async def emit_events(
        self, session_id: str, new_events: Sequence[Mapping[str, Any]]
    ) -> Sequence[Mapping[str, Any]]:
        """Append events of the agent to a session, and return the stored events."""
        if not all(is_storable_text(str(event.get("type", ""))) for event in new_events):
            raise APIError(400, "type has characters that are not printable", "type")

        async def attempt_to_emit_events(connection: Connection) -> Sequence[StoredEvent] | None:
            read = await self._read_session(connection, session_id)
            conversation = await self._load_conversation(connection, read)
            try:
                conversation.validate_server_events(new_events)
                copies = copy_events(new_events)
            except APIError:
                self._conversations.put(session_id, conversation)
                raise
            return await self._append_events(connection, read, conversation, copies)

        events = await self._retry_with_row_lock(attempt_to_emit_events, _LOCK, session_id)
        self._hub.announce_topic_changes(make_session_topic(session_id))
        return tuple(event.value for event in events)

    async def archive_session(self, session_id: str) -> SessionView:
        """Archive a session: terminate it, and request the stop of its work item."""
        await self.get_session(session_id)  # an unknown session raises a 404 here, before the lock

        async def archive_in_transaction() -> SessionView:
            async with self._pool.transaction() as connection:
                await connection.execute(_LOCK, session_id)
                read = await self._read_session(connection, session_id)
                if read.view.session.archived_at is None:
                    await self._archive_locked_session(connection, read)
                return (await self._read_session(connection, session_id)).view

        view = await self._pool.retry_colliding_call(archive_in_transaction)
        self._hub.announce_topic_changes(make_session_topic(session_id))
        return view

    async def _archive_locked_session(self, connection: Connection, read: _SessionRow) -> None:
        """Archive a session, whose row the caller has locked."""
        view = read.view
        await connection.execute(_ARCHIVE, view.id, read.now)
        if view.last_status != TERMINATED:
            conversation = await self._load_conversation(connection, read)
            await self._append_events(connection, read, conversation, [{"type": STATUS_TERMINATED}])
            # If this transaction fails later, the cache must not contain the event that the
            # transaction appended.
            self._conversations.pop(view.id)
        place = view.session.environment_id, view.item.id
        await connection.execute(LOCK_ITEM, *place)
        stored, item, version, now = await self._read_item(connection, *place)
        if item.state in {QUEUED, STARTING, ACTIVE}:
            changes = [] if item is stored else [make_change_that_ends_lease(stored)]
            changes.append(make_change_that_stops_item(item, None, now))
            await self._write_item(connection, stored, version, changes)

    async def _read_session(self, connection: Connection, session_id: str) -> _SessionRow:
        """Return a session; raises a 404 if this node knows no such session or environment."""
        row = None
        if has_id_format(session_id):
            row = await connection.fetchrow(_READ, session_id, self._read_test_clock())
        if row is None:
            raise APIError(404, "no such session")
        event_count, last_event_id, now = row[VIEW_WIDTH:]
        view = session_view_from_row(row)
        await self.require_self_hosted_environment(view.session.environment_id)
        return _SessionRow(
            view._replace(item=remove_ended_lease(view.item, now)), event_count, last_event_id, now
        )

    async def _load_conversation(self, connection: Connection, read: _SessionRow) -> Conversation:
        """Return the conversation of a session with its first `read.event_count` events.

        The argument `read` is the row of the session.
        """
        session = read.view.session
        conversation = self._conversations.pop(session.id)
        if conversation is None or not await self._conversation_matches_stored_events(
            connection, conversation, read
        ):
            conversation = Conversation(session.script)
        while (known := len(conversation.events)) < read.event_count:
            rows = await connection.fetch(_EVENTS, session.id, known, read.event_count)
            if not rows:
                raise APIError(404, "no such session")  # another call has just deleted the session
            for event_id, value in rows:
                conversation.append_event(event_from_columns(session.id, event_id, value))
        return conversation

    async def _conversation_matches_stored_events(
        self, connection: Connection, conversation: Conversation, read: _SessionRow
    ) -> bool:
        """Return whether a cached conversation equals the beginning of the stored events.

        After a failover to a database that lacks the last commits, other events may be stored in
        place of the cached ones.
        """
        known = len(conversation.events)
        if known == 0 or known > read.event_count:
            return known == 0
        last = read.last_event_id
        if known < read.event_count:
            last = await connection.fetchval(_EVENT_ID, read.view.id, known)
        return conversation.events[-1].id == last

    def _make_next_item(self, read: _SessionRow) -> Item:
        """Return a new item with which a worker continues the session."""
        session = read.view.session
        self._ids.skip_ids_up_to(read.view.item.id.removeprefix(WORK_PREFIX))
        return Item(
            id=WORK_PREFIX + self._ids.generate_id_digits(read.now),
            environment_id=session.environment_id,
            session_id=session.id,
            metadata=session.metadata,
            created_at=read.now,
        )

    async def _append_events(
        self,
        connection: Connection,
        read: _SessionRow,
        conversation: Conversation,
        new_events: Sequence[Mapping[str, Any]],
        item: Item | None = None,
    ) -> Sequence[StoredEvent] | None:
        """Append `new_events` and the control plane's responses; return the stored `new_events`.

        Returns None if another call has appended events since the session was read.

        `item`: a new item of the session, which is created with the events; None: none.
        """
        view = read.view
        now = read.now
        if read.last_event_id is not None:
            # The new events need greater ids and times than the stored events, even after the clock
            # of the database has gone back: the ids order the events.
            self._ids.skip_ids_up_to(read.last_event_id.rpartition("_")[2])
            now = max(now, parse_heartbeat_time(view.last_event_at or "") or 0)
        events = extend_conversation(conversation, view.id, new_events, self._ids, now)
        if not events:
            self._conversations.put(view.id, conversation)
            return ()
        values = [
            view.id,
            read.event_count,
            view.item.id,
            events[-1].id,
            conversation.last_event_at,
            conversation.status,
            view.item.id if item is None else item.id,
            *events_to_columns(events),
        ]
        if item is not None:
            values += [item.environment_id, item.created_at, to_json(item.metadata)]
        statement = _APPENDS[item is not None, self._has_history]
        if not await connection.fetchval(statement, *values):
            return None
        self._conversations.put(view.id, conversation)
        return events[: len(new_events)]
