"""The creation of items, each with a new session, in one statement."""

from __future__ import annotations

from dataclasses import replace
from itertools import accumulate
from typing import TYPE_CHECKING, Any, Final

from workpool.server.answer_limits import NEW_METADATA_LIMIT_BYTES, check_metadata_limits
from workpool.server.conversation import Conversation, extend_conversation
from workpool.server.parsing.session_script import parse_script
from workpool.server.postgres.database_calls import RECORD
from workpool.server.postgres.environment_calls import EnvironmentCalls
from workpool.server.postgres.notifications import make_work_topic
from workpool.server.postgres.row_codec import events_to_columns, session_to_row
from workpool.server.stored_item import SESSION_PREFIX, WORK_PREFIX, Item
from workpool.server.stored_session import SessionView, StoredSession
from workpool.wire.protocol import SESSION, TTL_DEFAULT_SECONDS

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from workpool.server.conversation import StoredEvent
    from workpool.server.parsing.creation_requests import NewSession

NEW_ITEM_COLUMNS: Final = (
    "id, environment_id, session_id, created_at, type, state, metadata, ttl_seconds, beaten"
)
_CREATE: Final = f"""
WITH opened AS (
    INSERT INTO sessions (
        id, environment_id, metadata, created_at, script, title, agent, archived_at,
        work_id, event_count, last_event_id, last_event_at, status
    )
    SELECT n.id, $2, $3, $4, $5, $6, $7, $8,
        n.work_id, n.event_count, n.last_event_id, n.last_event_at, n.status
    FROM unnest($1::text[], $9::text[], $10::bigint[], $11::text[], $12::text[], $13::text[])
        AS n (id, work_id, event_count, last_event_id, last_event_at, status)
), created AS (
    INSERT INTO items ({NEW_ITEM_COLUMNS})
    SELECT n.work_id, $2, n.id, $4, $14, 'queued', $3, {TTL_DEFAULT_SECONDS}, false
    FROM unnest($1::text[], $9::text[]) AS n (id, work_id)
), told AS (
    INSERT INTO events (session_id, seq, id, type, processed_at, value)
    SELECT * FROM unnest(
        $15::text[], $16::bigint[], $17::text[], $18::text[], $19::text[], $20::text[]
    )
){{}}
SELECT 1
"""
_CREATES: Final = {
    False: _CREATE.format(""),
    True: _CREATE.format(
        f""", recorded AS ({
            RECORD.format(
                "SELECT $4, n.work_id, 'created', NULL, 'queued', NULL, NULL "
                "FROM unnest($9::text[]) AS n (work_id)"
            )
        })"""
    ),
}
"""The creation of sessions with an item each, by whether there is a history."""


class CreationCalls(EnvironmentCalls):
    """The calls that create items and sessions."""

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
        """Create items, each with a session of its own.

        Raises:
            ValueError: `session_id` is given: here, only a message brings a session another item.
        """
        if session_id is not None:
            raise ValueError("a control plane on PostgreSQL adds items to a session by messages")
        await self.require_self_hosted_environment(environment_id)
        metadata = dict(metadata or {})
        check_metadata_limits(metadata, NEW_METADATA_LIMIT_BYTES)
        parsed = None if script is None else parse_script(script, count)
        now = await self._current_time()
        template = StoredSession("", environment_id, metadata, now, parsed)
        return [view.item for view in await self._create_sessions(template, count, work_type)]

    async def create_session(self, wanted: NewSession) -> SessionView:
        """Create a session, and queue its first work item."""
        await self.require_self_hosted_environment(wanted.environment_id)
        check_metadata_limits(wanted.metadata, NEW_METADATA_LIMIT_BYTES)
        template = StoredSession(
            "",
            wanted.environment_id,
            wanted.metadata,
            await self._current_time(),
            wanted.script,
            wanted.title,
            wanted.agent,
        )
        (view,) = await self._create_sessions(template, 1, SESSION, wanted.initial_events)
        return view

    async def _create_sessions(
        self,
        template: StoredSession,
        count: int,
        work_type: str,
        initial_events: Sequence[Mapping[str, Any]] = (),
    ) -> list[SessionView]:
        """Create `count` sessions like `template`, each with an item and `initial_events`."""
        views: list[SessionView] = []
        events: list[StoredEvent] = []
        counts: list[int] = []
        for _ in range(count):
            view, first = self._make_session(template, work_type, initial_events)
            views.append(view)
            events += first
            counts.append(len(first))
        ends = zip(accumulate(counts), counts, strict=True)
        await self._pool.execute(
            _CREATES[self._has_history],
            [view.id for view in views],
            *session_to_row(template)[1:],
            [view.item.id for view in views],
            counts,
            [events[end - 1].id if own else None for end, own in ends],
            [view.last_event_at for view in views],
            [view.last_status for view in views],
            work_type,
            [event.session_id for event in events],
            [seq for own in counts for seq in range(1, own + 1)],
            *events_to_columns(events),
        )
        self._hub.announce_topic_changes(make_work_topic(template.environment_id), count)
        return views

    def _make_session(
        self,
        template: StoredSession,
        work_type: str,
        initial_events: Sequence[Mapping[str, Any]],
    ) -> tuple[SessionView, list[StoredEvent]]:
        now = template.created_at
        session = replace(template, id=SESSION_PREFIX + self._ids.generate_id_digits(now))
        item = Item(
            id=WORK_PREFIX + self._ids.generate_id_digits(now),
            environment_id=session.environment_id,
            session_id=session.id,
            type=work_type,
            metadata=session.metadata,
            created_at=now,
        )
        conversation = Conversation(session.script)
        if initial_events:
            conversation.validate_client_events(initial_events)
        events: list[StoredEvent] = []
        if initial_events or session.script is not None:
            events = extend_conversation(conversation, session.id, initial_events, self._ids, now)
        return SessionView(session, item, conversation.status, conversation.last_event_at), events
