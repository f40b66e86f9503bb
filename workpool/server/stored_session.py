"""One session of the control plane, its JSON, and the filter for lists of sessions.

See workpool/docs/protocol.md, "Sessions".
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from workpool.server.timestamps import (
    TimeRange,
    format_heartbeat_time,
    format_time_with_whole_seconds,
)
from workpool.wire.protocol import ACTIVE, QUEUED, SESSION, STARTING, STOPPED, STOPPING

if TYPE_CHECKING:
    from collections.abc import Mapping

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

TERMINATED: Final = "terminated"

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
    """A session as it is stored. An update of an item's metadata does not change `metadata` here.

    Attributes:
        script: The tool uses of a scripted session; None: the session has no script.
        agent: `id` and `version` of the agent that the client asked for; None: `AGENT` itself.
        archived_at: The time at which the session was archived; None: not archived.
    """

    id: str
    environment_id: str
    metadata: Mapping[str, str]
    created_at: int
    script: Script | None = None
    title: str | None = None
    agent: Mapping[str, Any] | None = None
    archived_at: int | None = None


class SessionView(NamedTuple):
    """A session with its latest work item, its last status and the time of its last event.

    Attributes:
        session: The session.
        item: The session's latest work item.
        last_status: The status in the session's last status event; None: no status event.
        last_event_at: The time of the session's last event; None: no events.
    """

    session: StoredSession
    item: Item
    last_status: str | None
    last_event_at: str | None

    @property
    def id(self) -> str:
        """The id of the session."""
        return self.session.id

    @property
    def status(self) -> str:
        """The status of the session."""
        if self.last_status == TERMINATED:
            return self.last_status  # a session stays terminated, whatever its item's state is
        if self.last_status is None or self.item.state == STOPPING:
            return STATUS[self.item.state]
        return self.last_status

    @property
    def updated_at(self) -> str:
        """The latest time of an event in the session or of a state change of its item."""
        item = self.item
        changes = (item.acknowledged_at, item.started_at, item.stop_requested_at, item.stopped_at)
        changed = format_heartbeat_time(max(item.created_at, *(time or 0 for time in changes)))
        return max(changed, self.last_event_at or "")

    def to_json(self) -> dict[str, Any]:
        """Return the session's JSON, with all fields that the vendors' SDKs require."""
        session = self.session
        return {
            "id": session.id,
            "type": SESSION,
            "status": self.status,
            "environment_id": session.environment_id,
            "agent": AGENT if session.agent is None else {**AGENT, **session.agent},
            "metadata": session.metadata,
            "title": session.title,
            "resources": [],
            "vault_ids": [],
            "outcome_evaluations": [],
            "stats": {},
            "usage": USAGE,
            "created_at": format_time_with_whole_seconds(session.created_at),
            "updated_at": self.updated_at,
            "archived_at": (
                None
                if session.archived_at is None
                else format_time_with_whole_seconds(session.archived_at)
            ),
        }


class SessionFilter(NamedTuple):
    """The filter and sort order of a list of sessions. A field that is None allows any value.

    Attributes:
        environments: Only sessions of these environments.
        archived: Whether the list has archived sessions too.
        times: Only sessions that were created at these times.
        agent_id: Only sessions of this agent.
        agent_version: Only sessions of this version of the agent.
        statuses: Only sessions with one of these statuses.
        newest_first: Whether the list begins with the newest session.
    """

    environments: frozenset[str] | None = None
    archived: bool = True
    times: TimeRange = TimeRange()
    agent_id: str | None = None
    agent_version: str | None = None
    statuses: frozenset[str] | None = None
    newest_first: bool = False

    def matches(self, view: SessionView) -> bool:
        """Return whether the filter selects this session."""
        session = view.session
        return (
            (self.environments is None or session.environment_id in self.environments)
            and (self.archived or session.archived_at is None)
            and self.times.contains(format_heartbeat_time(session.created_at))
            and self._matches_agent(session.agent or AGENT)
            and (self.statuses is None or view.status in self.statuses)
        )

    def _matches_agent(self, agent: Mapping[str, Any]) -> bool:
        if self.agent_id is None:
            return True
        version = self.agent_version
        return agent["id"] == self.agent_id and (
            version is None or str(agent.get("version", 1)) == version
        )
