"""The session of an item, and its events.

See workpool/docs/protocol.md, "Sessions".
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from workpool.conformance.clause import clause
from workpool.conformance.clauses.auth_and_errors import UNKNOWN
from workpool.conformance.trial import is_bad_request, is_conflict
from workpool.conformance.verdict import Untried, same_or_breaks, same_or_differs
from workpool.server.http.server_dialects import DIALECTS
from workpool.wire.items import parse_item
from workpool.wire.protocol import AGENT_TOOL_USE, USER_TOOL_RESULT

if TYPE_CHECKING:
    from workpool.conformance.shared_queue import Subject
    from workpool.conformance.trial import Trial
    from workpool.conformance.work_sources import Script

FIELDS: Final = ("id", "type", "status", "environment_id", "agent", "metadata")
SCRIPT: Final = ({"name": "Bash", "input": {"command": "true"}},)
NO_EVENTS: Final = "handlers cannot talk in a session"


@clause("session-object", "A session has the fields that workers read.")
async def fields_of_a_session(trial: Trial) -> None:
    """Read the session of an item."""
    answer = await trial.api("GET", await _claim_session_url(trial))
    same_or_differs(answer.ok, str(answer))
    dialect = DIALECTS[trial.api.dialect]
    names = FIELDS + dialect.session_fields
    missing = [name for name in names if answer.get(name) is None]
    agent = answer.get("agent")
    if isinstance(agent, dict):
        missing += [f"agent.{name}" for name in dialect.agent_fields if name not in agent]
    same_or_differs(not missing, f"without {', '.join(missing)}: the vendor's workers may fail")


@clause("events-list", "The events can be listed.")
async def list_of_events(trial: Trial) -> None:
    """List the events of an item's session."""
    answer = await trial.api("GET", f"{await _claim_session_url(trial)}/events")
    same_or_differs(answer.ok and isinstance(answer.get("data"), list), f"{answer}: {NO_EVENTS}")


@clause("events-stream", "The events can be streamed.")
async def stream_of_events(trial: Trial) -> None:
    """Open the stream of an item's session, and close it."""
    status, kind = await trial.api.open_stream(f"{await _claim_session_url(trial)}/events/stream")
    opened = status == 200 and kind == "text/event-stream"  # noqa: PLR2004 - the HTTP status
    same_or_differs(opened, f"HTTP {status} {kind}: {NO_EVENTS}")


@clause("item-secret", "The secret of an item is a token for its own session (`anthropic`).")
async def secret_of_an_item(trial: Trial) -> None:
    """Read the session of the item's own token, then that of another item."""
    subject, another = await trial.claim(), await trial.claim()
    try:
        token = parse_item(subject.deliveries[0].item).sessions_token
    except ValueError:
        raise Untried("the item cannot be read") from None
    if token is None:
        secrets = DIALECTS[trial.api.dialect].item_secrets
        same_or_differs(not secrets, "no secret: the worker's key has to do")
        return
    item = trial.api.as_worker(trial.api.worker, token.get_secret_value())
    own = await item("GET", _session_url(trial, subject))
    same_or_breaks(own.ok, f"{own} for the session of the item")
    foreign = await item("GET", _session_url(trial, another))
    same_or_differs(not foreign.ok, f"{foreign} for the session of another item")


@clause("result-once", "A second result for one tool use is a 409.")
async def second_result(trial: Trial) -> None:
    """Answer a tool use twice, as a worker does after a lost answer."""
    url = f"{await _claim_session_url(trial, SCRIPT)}/events"
    listed = await trial.api("GET", url)
    rows = listed.get("data")
    events = rows if isinstance(rows, list) else []
    uses = [each["id"] for each in events if each.get("type") == AGENT_TOOL_USE]
    if not uses:
        raise Untried("the session uses no tool")
    first = await trial.api("POST", url, json=_result_body(uses[0]))
    same_or_breaks(first.ok, f"the first: {first}")
    second = await trial.api("POST", url, json=_result_body(uses[0]))
    same_or_breaks(not second.ok, f"{second}: a result is applied twice")
    same_or_differs(is_conflict(second), str(second))


@clause("result-unknown", "A result for an unknown tool use is a 400.")
async def result_for_an_unknown_use(trial: Trial) -> None:
    """Answer an unknown tool use."""
    url = f"{await _claim_session_url(trial)}/events"
    answer = await trial.api("POST", url, json=_result_body(f"evt_{UNKNOWN}"))
    same_or_differs(is_bad_request(answer), str(answer))


async def _claim_session_url(trial: Trial, script: Script | None = None) -> str:
    """Return the URL of an item's session."""
    return _session_url(trial, await trial.claim(script))


def _session_url(trial: Trial, subject: Subject) -> str:
    if not subject.session_id:
        raise Untried("the item names no session")
    return f"{trial.api.base_url}/sessions/{subject.session_id}"


def _result_body(use_id: str) -> dict[str, Any]:
    content = [{"type": "text", "text": "workpool conform"}]
    result_event = {"type": USER_TOOL_RESULT, "tool_use_id": use_id, "content": content}
    return {"events": [result_event]}
