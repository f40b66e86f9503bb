"""Session objects (protocol §5): what a work item's `data.id` names. Events come later.

The services own sessions; here one is born with every work item and says what its item tells.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from workpool.server.clock import to_seconds_text
from workpool.wire.protocol import ACTIVE, QUEUED, SESSION, STARTING, STOPPED, STOPPING

if TYPE_CHECKING:
    from collections.abc import Mapping

    from workpool.server.item import Item
    from workpool.wire.protocol import State

STATUS: Final[Mapping[State, str]] = {
    QUEUED: "idle",
    STARTING: "idle",
    ACTIVE: "running",
    STOPPING: "canceling",
    STOPPED: "idle",
}

AGENT: Final[Mapping[str, Any]] = {
    "id": "agent_00000000000070008000000000000001",
    "type": "agent",
    "name": "workpool",
    "version": 1,
}


@dataclass(frozen=True, slots=True)
class Session:
    """A session. Its metadata are those that its first item was created with."""

    id: str
    environment_id: str
    metadata: Mapping[str, str]
    created_at: int

    def answer(self, item: Item) -> dict[str, Any]:
        """Return the session's JSON; `item` is the latest work item of this session."""
        return {
            "id": self.id,
            "type": SESSION,
            "status": STATUS[item.state],
            "environment_id": self.environment_id,
            "agent": AGENT,
            "metadata": self.metadata,
            "title": None,
            "created_at": to_seconds_text(self.created_at),
            "archived_at": None,
        }
