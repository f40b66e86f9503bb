"""The session of an item, and its events.

See workpool/docs/protocol.md, "Sessions".
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from workpool.conformance.clause import Untried, clause, same_or_differs
from workpool.wire.protocol import ANTHROPIC

if TYPE_CHECKING:
    from workpool.conformance.trial import Trial

FIELDS: Final = ("id", "type", "status", "environment_id", "agent", "metadata")
VENDOR_FIELDS: Final = (
    "resources",
    "vault_ids",
    "outcome_evaluations",
    "stats",
    "usage",
    "updated_at",
)
VENDOR_AGENT_FIELDS: Final = ("skills", "tools", "mcp_servers", "model")
NO_EVENTS: Final = "handlers cannot talk in a session"


@clause("session-object", "A session has the fields that workers read.")
async def fields_of_a_session(trial: Trial) -> None:
    """Read the session of an item."""
    answer = await trial.api("GET", await _session(trial))
    same_or_differs(answer.ok, str(answer))
    names = FIELDS + (VENDOR_FIELDS if trial.api.dialect == ANTHROPIC else ())
    missing = [name for name in names if answer.get(name) is None]
    agent = answer.get("agent")
    if trial.api.dialect == ANTHROPIC and isinstance(agent, dict):
        missing += [f"agent.{name}" for name in VENDOR_AGENT_FIELDS if name not in agent]
    same_or_differs(not missing, f"without {', '.join(missing)}: the vendor's workers may fail")


@clause("events-list", "The events can be listed.")
async def list_of_events(trial: Trial) -> None:
    """List the events of an item's session."""
    answer = await trial.api("GET", f"{await _session(trial)}/events")
    same_or_differs(answer.ok and isinstance(answer.get("data"), list), f"{answer}: {NO_EVENTS}")


@clause("events-stream", "The events can be streamed.")
async def stream_of_events(trial: Trial) -> None:
    """Open the stream of an item's session, and close it."""
    status, kind = await trial.api.open_stream(f"{await _session(trial)}/events/stream")
    opened = status == 200 and kind == "text/event-stream"  # noqa: PLR2004 - the HTTP status
    same_or_differs(opened, f"HTTP {status} {kind}: {NO_EVENTS}")


async def _session(trial: Trial) -> str:
    """Return the URL of an item's session."""
    subject = await trial.claim()
    if not subject.session_id:
        raise Untried("the item names no session")
    return f"{trial.api.base_url}/sessions/{subject.session_id}"
