"""One session of the control plane, and its JSON.

See workpool/docs/protocol.md, "Sessions".
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from workpool.server.timestamps import to_heartbeat_text, to_seconds_text
from workpool.wire.protocol import ACTIVE, QUEUED, SESSION, STARTING, STOPPED, STOPPING

if TYPE_CHECKING:
    from collections.abc import Mapping

    from workpool.server.conversation import Conversation
    from workpool.server.parsing.session_script import Script
    from workpool.server.stored_item import Item
    from workpool.wire.protocol import State

STATUS: Final[Mapping[State, str]] = {
    QUEUED: "idle",
    STARTING: "idle",
    ACTIVE: "running",
    STOPPING: "canceling",
    STOPPED: "idle",
}
"""The status of a session without events, by its item's state."""

AGENT: Final[Mapping[str, Any]] = {
    "id": "agent_00000000000070008000000000000001",
    "type": "agent",
    "name": "workpool",
    "version": 1,
    "description": None,
    "system": None,
    "model": {"id": "none"},
    "tools": [],
    "mcp_servers": [],
    "skills": [],
    "multiagent": None,
    "execution_identity": {"type": "service_account"},
}
"""The agent of every session, with all fields that the vendors' workers read; it has no model."""

USAGE: Final[Mapping[str, Any]] = {
    "input_tokens": 0,
    "output_tokens": 0,
    "cache_read_input_tokens": 0,
}


@dataclass(frozen=True, slots=True)
class StoredSession:
    """A session. Its metadata are those of its first item at its creation.

    Attributes:
        script: The tool uses of a scripted session; None: the session has no script.
        agent: `id` and `version` of the agent that its creator asked for; None: `AGENT` itself.
        archived_at: The time at which it was archived; None: it is not archived.
    """

    id: str
    environment_id: str
    metadata: Mapping[str, str]
    created_at: int
    script: Script | None = None
    title: str | None = None
    agent: Mapping[str, Any] | None = None
    archived_at: int | None = None

    def answer(self, item: Item, conversation: Conversation | None) -> dict[str, Any]:
        """Return the session's JSON, with all fields that the vendors' SDKs require.

        `item`: its latest work item; `conversation`: None while there are no events.
        """
        return {
            "id": self.id,
            "type": SESSION,
            "status": _status(item, conversation),
            "environment_id": self.environment_id,
            "agent": AGENT if self.agent is None else {**AGENT, **self.agent},
            "metadata": self.metadata,
            "title": self.title,
            "resources": [],
            "vault_ids": [],
            "outcome_evaluations": [],
            "stats": {},
            "usage": USAGE,
            "created_at": to_seconds_text(self.created_at),
            "updated_at": _updated_at(item, conversation),
            "archived_at": (
                None if self.archived_at is None else to_seconds_text(self.archived_at)
            ),
        }


def _status(item: Item, conversation: Conversation | None) -> str:
    last_status = None if conversation is None else conversation.status
    if last_status == "terminated":
        return last_status  # the final status, whatever the state of the item
    return STATUS[item.state] if last_status is None or item.state == STOPPING else last_status


def _updated_at(item: Item, conversation: Conversation | None) -> str:
    """Return the time of the last change of the item's state or of the events."""
    changes = (item.acknowledged_at, item.started_at, item.stop_requested_at, item.stopped_at)
    changed = to_heartbeat_text(max(item.created_at, *(time or 0 for time in changes)))
    if conversation is None or not conversation.events:
        return changed
    return max(changed, str(conversation.events[-1].value["processed_at"]))
