"""The sessions of a control plane and their events, in memory.

The `data.id` of a work item is the id of its session. The module owns
their events: in one step each change is checked, gets its id, is saved and is sent to the open
streams. See workpool/docs/protocol.md, "Sessions".
"""

from __future__ import annotations

import asyncio
from contextlib import suppress
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from workpool.server.api_errors import APIError
from workpool.server.ascending_ids import AscendingIdList, iterate_ids
from workpool.server.conversation import Conversation, StoredEvent, copy_events, extend_conversation
from workpool.server.stored_item import SESSION_PREFIX
from workpool.server.stored_session import SessionView, StoredSession
from workpool.wire.protocol import (
    STATUS_TERMINATED,
)

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from workpool.server.parsing.session_script import Script
    from workpool.server.stored_item import IdGenerator, Item
    from workpool.server.stores.store import Store, StoreContents


class SessionRegistry:
    """All sessions of a control plane, for use on one event loop."""

    def __init__(self, store: Store, ids: IdGenerator) -> None:
        self._store = store
        self._ids = ids
        self._sessions: dict[str, tuple[StoredSession, str]] = {}
        # The ids of each session's items, except the latest item.
        self._earlier: dict[str, list[str]] = {}
        self._order = AscendingIdList()  # the keys of `_sessions`, sorted
        self._conversations: dict[str, Conversation] = {}
        self._following: dict[str, set[asyncio.Event]] = {}
        self._closing = False

    def restore_sessions(self, contents: StoreContents, ids: IdGenerator, now: int) -> None:
        """Restore the stored sessions and their events.

        Append the control plane's response events that a crash kept it from appending.
        """
        self._ids = ids
        sessions = {session.id: session for session in contents.sessions}
        for item in contents.items:
            self._add_session(sessions[item.session_id], item.id)
        self._order = AscendingIdList(sorted(self._sessions))
        for event in contents.events:
            self.get_conversation(event.session_id).append_event(event)
        for session, _ in self._sessions.values():
            if session.script is not None or session.id in self._conversations:
                self._append_events(session.id, (), now)

    def find_session(self, session_id: str) -> tuple[StoredSession, str]:
        """Return a session and the id of its latest item; raises a 404 for an unknown session."""
        found = self._sessions.get(session_id)
        if found is None:
            raise APIError(404, "no such session")
        return found

    def item_ids(self, session_id: str) -> list[str]:
        """Return the ids of a session's items; an empty list for an unknown session."""
        found = self._sessions.get(session_id)
        return [] if found is None else [*self._earlier.get(session_id, ()), found[1]]

    def remove_session(self, session_id: str) -> list[StoredSession | StoredEvent]:
        """Remove a session and its events, end the session's streams; return the removed rows."""
        session, _ = self._sessions.pop(session_id)
        self._earlier.pop(session_id, None)
        self._order.remove(session_id)
        conversation = self._conversations.pop(session_id, None)
        self._wake_streams(session_id)
        return [session, *(conversation.events if conversation is not None else ())]

    def _add_session(self, session: StoredSession, work_id: str) -> None:
        former = self._sessions.get(session.id)
        if former is not None:
            self._earlier.setdefault(session.id, []).append(former[1])
        self._sessions[session.id] = (session, work_id)

    def iterate_sessions(
        self, *, after: str = "", before: str | None = None, newest_first: bool = False
    ) -> Iterator[tuple[StoredSession, str]]:
        """Iterate over sessions between two ids, each with the id of its latest item."""
        walked = iterate_ids(self._order, after=after, before=before, newest_first=newest_first)
        # Other calls may delete sessions between two steps of the iteration: skip deleted ones.
        return (self._sessions[each] for each in walked if each in self._sessions)

    def get_conversation(self, session_id: str) -> Conversation:
        """Return the conversation of a session; raises a 404 for an unknown session."""
        found = self._conversations.get(session_id)
        if found is None:
            found = self._conversations[session_id] = Conversation(
                self.find_session(session_id)[0].script
            )
        return found

    def make_session_view(self, session: StoredSession, item: Item) -> SessionView:
        """Return the view of a session whose latest work item is `item`."""
        conversation = self._conversations.get(session.id)
        if conversation is None:
            return SessionView(session, item, None, None)
        return SessionView(session, item, conversation.status, conversation.last_event_at)

    def create_session(
        self,
        environment_id: str,
        metadata: Mapping[str, str],
        script: Script | None,
        now: int,
        **more: Any,
    ) -> StoredSession:
        """Create a session, to which the caller must attach an item with `attach_item_to_session`.

        `more`: further fields of `StoredSession`.
        """
        session_id = SESSION_PREFIX + self._ids.generate_id_digits(now)
        session = StoredSession(session_id, environment_id, metadata, now, script, **more)
        self._store.save_session(session)
        return session

    def attach_item_to_session(
        self,
        session: StoredSession,
        work_id: str,
        now: int,
        new_events: Sequence[Mapping[str, Any]] = (),
    ) -> None:
        """Set the latest work item of a session, and append `new_events` to the session."""
        if session.id not in self._sessions:
            self._order.append(session.id)
        self._add_session(session, work_id)
        if new_events:
            self.send_events(session.id, new_events, now)
        elif session.script is not None:
            self._append_events(session.id, (), now)

    def archive_session(self, session: StoredSession, now: int) -> StoredSession:
        """Archive a session, which terminates it."""
        archived = replace(session, archived_at=now)
        self._sessions[session.id] = (archived, self._sessions[session.id][1])
        self._store.save_session(archived)
        if self.get_conversation(session.id).status != "terminated":
            self._append_events(session.id, [{"type": STATUS_TERMINATED}], now)
        return archived

    def send_events(
        self, session_id: str, new_events: Sequence[Mapping[str, Any]], now: int
    ) -> Sequence[StoredEvent]:
        """Append a client's events: all of them, or none if one is refused."""
        self.get_conversation(session_id).validate_client_events(new_events)
        return self._append_events(session_id, new_events, now)

    def emit_events(
        self, session_id: str, new_events: Sequence[Mapping[str, Any]], now: int
    ) -> Sequence[StoredEvent]:
        """Append events that a caller in this process supplies in the name of the agent."""
        self.get_conversation(session_id).validate_server_events(new_events)
        return self._append_events(session_id, copy_events(new_events), now)

    async def wait_for_events(self, session_id: str, place: int, seconds: float) -> bool:
        """Wait until a session has more than `place` events, but not longer than `seconds`.

        Returns False if no event can follow: the session was deleted, or the control plane closes.
        """
        if session_id not in self._sessions:
            return False
        conversation = self.get_conversation(session_id)
        if len(conversation.events) <= place and not self._closing:
            changed = asyncio.Event()
            following = self._following.setdefault(session_id, set())
            following.add(changed)
            try:
                with suppress(TimeoutError):
                    async with asyncio.timeout(seconds):
                        await changed.wait()
            finally:
                following.discard(changed)
                if not following:
                    self._following.pop(session_id, None)
        return not self._closing and session_id in self._sessions

    def end_waiting_calls(self) -> None:
        """End all waits, since the control plane closes."""
        self._closing = True
        for session_id in list(self._following):
            self._wake_streams(session_id)

    def _append_events(
        self, session_id: str, new_events: Sequence[Mapping[str, Any]], now: int
    ) -> Sequence[StoredEvent]:
        """Append and save `new_events` and the control plane's responses; wake the streams."""
        events = extend_conversation(
            self.get_conversation(session_id), session_id, new_events, self._ids, now
        )
        if events:
            self._store.save_events(events)
            self._wake_streams(session_id)
        return events[: len(new_events)]

    def _wake_streams(self, session_id: str) -> None:
        for changed in self._following.get(session_id, ()):
            changed.set()
