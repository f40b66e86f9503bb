"""A cache of conversations, so that an append reads only the events that are not cached."""

from __future__ import annotations

from collections import OrderedDict
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from workpool.server.conversation import Conversation

EVENTS_MAX: Final = 50_000
"""Largest number of events in all kept conversations."""


class ConversationCache:
    """Recently used conversations by session id, up to a total number of events.

    A conversation leaves the cache while it is used, and returns once its new events are committed,
    so that the cache has committed events only.
    """

    def __init__(self, limit: int = EVENTS_MAX) -> None:
        self._limit = limit
        self._kept: OrderedDict[str, Conversation] = OrderedDict()
        self._count = 0

    def pop(self, session_id: str) -> Conversation | None:
        """Remove and return a conversation; None if the cache does not have it."""
        found = self._kept.pop(session_id, None)
        if found is not None:
            self._count -= len(found.events)
        return found

    def put(self, session_id: str, conversation: Conversation) -> None:
        """Add a conversation, which no caller may change while it is in the cache."""
        self.pop(session_id)
        self._kept[session_id] = conversation
        self._count += len(conversation.events)
        while self._count > self._limit:
            _, dropped = self._kept.popitem(last=False)
            self._count -= len(dropped.events)
