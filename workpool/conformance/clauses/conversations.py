"""Clauses about the session of an item, the session's events, and the item's own token.

See workpool/docs/protocol.md, "Sessions".
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from workpool.conformance.clause import clause
from workpool.conformance.clause_trial import is_bad_request, is_conflict
from workpool.conformance.clauses.auth_and_errors import UNKNOWN
from workpool.conformance.verdict import (
    ClauseUntriedError,
    raise_clause_broken_unless,
    raise_clause_differs_unless,
)
from workpool.server.http.server_dialects import DIALECTS
from workpool.wire.items import parse_item
from workpool.wire.protocol import AGENT_TOOL_USE, USER_TOOL_RESULT

if TYPE_CHECKING:
    from workpool.conformance.clause_trial import ClauseTrial
    from workpool.conformance.shared_queue import SuiteItem
    from workpool.conformance.work_sources import Script

FIELDS: Final = ("id", "type", "status", "environment_id", "agent", "metadata")
SCRIPT: Final = ({"name": "Bash", "input": {"command": "true"}},)
NO_EVENTS: Final = "handlers cannot talk in a session"


@clause("session-object", "A session has the fields that workers read.")
async def check_session_has_fields_that_workers_read(trial: ClauseTrial) -> None:
    """Read the session of an item, and check that no field is missing."""
    answer = await trial.api("GET", await _claim_item_returning_session_url(trial))
    raise_clause_differs_unless(answer.ok, str(answer))
    dialect = DIALECTS[trial.api.dialect]
    names = FIELDS + dialect.session_fields
    missing = [name for name in names if answer.get(name) is None]
    agent = answer.get("agent")
    if isinstance(agent, dict):
        missing += [f"agent.{name}" for name in dialect.agent_fields if name not in agent]
    raise_clause_differs_unless(
        not missing, f"without {', '.join(missing)}: the vendor's workers may fail"
    )


@clause("events-list", "The events can be listed.")
async def check_events_can_be_listed(trial: ClauseTrial) -> None:
    """List the events of an item's session."""
    answer = await trial.api("GET", f"{await _claim_item_returning_session_url(trial)}/events")
    raise_clause_differs_unless(
        answer.ok and isinstance(answer.get("data"), list), f"{answer}: {NO_EVENTS}"
    )


@clause("events-stream", "The events can be streamed.")
async def check_events_can_be_streamed(trial: ClauseTrial) -> None:
    """Open the stream of an item's session, and close it."""
    status, kind = await trial.api.open_stream(
        f"{await _claim_item_returning_session_url(trial)}/events/stream"
    )
    opened = status == 200 and kind == "text/event-stream"  # noqa: PLR2004 - the HTTP status
    raise_clause_differs_unless(opened, f"HTTP {status} {kind}: {NO_EVENTS}")


@clause("item-secret", "The secret of an item is a token for its own session (`anthropic`).")
async def check_item_secret_opens_own_session_only(trial: ClauseTrial) -> None:
    """Use an item's token to read the item's session, then the session of another item."""
    subject, another = await trial.claim_item(), await trial.claim_item()
    try:
        token = parse_item(subject.deliveries[0].item).sessions_token
    except ValueError:
        raise ClauseUntriedError("the item cannot be read") from None
    if token is None:
        secrets = DIALECTS[trial.api.dialect].item_secrets
        raise_clause_differs_unless(not secrets, "no secret: the worker's key has to do")
        return
    item = trial.api.copy_as_worker(trial.api.worker, token.get_secret_value())
    own = await item("GET", _make_session_url(trial, subject))
    raise_clause_broken_unless(own.ok, f"{own} for the session of the item")
    foreign = await item("GET", _make_session_url(trial, another))
    raise_clause_differs_unless(not foreign.ok, f"{foreign} for the session of another item")


@clause("result-once", "A second result for one tool use is a 409.")
async def check_second_result_is_refused(trial: ClauseTrial) -> None:
    """Send a tool result twice, as a worker does after a lost answer."""
    url = f"{await _claim_item_returning_session_url(trial, SCRIPT)}/events"
    listed = await trial.api("GET", url)
    rows = listed.get("data")
    events = rows if isinstance(rows, list) else []
    uses = [each["id"] for each in events if each.get("type") == AGENT_TOOL_USE]
    if not uses:
        raise ClauseUntriedError("the session uses no tool")
    first = await trial.api("POST", url, json=_make_tool_result_body(uses[0]))
    raise_clause_broken_unless(first.ok, f"the first: {first}")
    second = await trial.api("POST", url, json=_make_tool_result_body(uses[0]))
    raise_clause_broken_unless(not second.ok, f"{second}: a result is applied twice")
    raise_clause_differs_unless(is_conflict(second), str(second))


@clause("result-unknown", "A result for an unknown tool use is a 400.")
async def check_result_for_unknown_tool_use_is_refused(trial: ClauseTrial) -> None:
    """Send a result for a tool use that does not exist."""
    url = f"{await _claim_item_returning_session_url(trial)}/events"
    answer = await trial.api("POST", url, json=_make_tool_result_body(f"evt_{UNKNOWN}"))
    raise_clause_differs_unless(is_bad_request(answer), str(answer))


async def _claim_item_returning_session_url(
    trial: ClauseTrial, script: Script | None = None
) -> str:
    """Claim an item, and return the URL of its session."""
    return _make_session_url(trial, await trial.claim_item(script))


def _make_session_url(trial: ClauseTrial, subject: SuiteItem) -> str:
    if not subject.session_id:
        raise ClauseUntriedError("the item names no session")
    return f"{trial.api.base_url}/sessions/{subject.session_id}"


def _make_tool_result_body(use_id: str) -> dict[str, Any]:
    content = [{"type": "text", "text": "workpool conform"}]
    result_event = {"type": USER_TOOL_RESULT, "tool_use_id": use_id, "content": content}
    return {"events": [result_event]}
