"""Clauses about the requests that stop an item, with and without force.

See workpool/docs/protocol.md, "Stop".
"""

from __future__ import annotations

from http import HTTPStatus
from typing import TYPE_CHECKING, Final

from workpool.conformance.clause import clause
from workpool.conformance.clause_trial import is_conflict
from workpool.conformance.verdict import raise_clause_broken_unless, raise_clause_differs_unless
from workpool.server.http.server_dialects import DIALECTS
from workpool.wire.protocol import STOPPED, STOPPING

if TYPE_CHECKING:
    from workpool.conformance.clause_trial import ClauseTrial

WATCHED_SECONDS: Final = 8.0


@clause("stop-force", "`force` ends an item at once.")
async def check_forced_stop_ends_item(trial: ClauseTrial) -> None:
    """Stop an item with force, as a worker does at the end of a session."""
    subject = await trial.create_active_item()
    answer = await trial.api.stop(subject.id, json={"force": True})
    raise_clause_broken_unless(answer.ok, str(answer))
    state = await trial.read_item_state(subject)
    raise_clause_differs_unless(state == STOPPED, f"the item is {state}")
    item = DIALECTS[trial.api.dialect].stop_answers_item
    as_documented = (
        answer.get("id") == subject.id if item else answer.status == HTTPStatus.NO_CONTENT
    )
    form = "without the item" if item else "with a body"
    raise_clause_differs_unless(as_documented, f"HTTP {answer.status} {form}")


@clause("stop-graceful", "Without `force` an `active` item becomes `stopping`.")
async def check_graceful_stop_makes_item_stopping(trial: ClauseTrial) -> None:
    """Stop an item gracefully, as an operator does."""
    subject = await trial.create_active_item()
    answer = await trial.api.stop(subject.id, json={"force": False})
    raise_clause_broken_unless(answer.ok, str(answer))
    state = await trial.read_item_state(subject)
    raise_clause_differs_unless(state == STOPPING, f"the item is {state}")


@clause("stop-confirm", "A second graceful stop ends it (`qoder`) or is a 409 (`anthropic`).")
async def check_second_graceful_stop_ends_item(trial: ClauseTrial) -> None:
    """Stop an item gracefully a second time, as a worker does to confirm the stop."""
    subject = await trial.create_active_item()
    await trial.stop_item(subject, force=False)
    answer = await trial.api.stop(subject.id, json={"force": False})
    if (False, STOPPING) not in DIALECTS[trial.api.dialect].stop_refused:
        state = await trial.read_item_state(subject)
        raise_clause_differs_unless(
            answer.ok and state == STOPPED, f"{answer}, the item is {state}"
        )
    else:
        raise_clause_differs_unless(is_conflict(answer), str(answer))


@clause("stop-queued", "A `queued` item becomes `stopped`.")
async def check_stop_request_ends_queued_item(trial: ClauseTrial) -> None:
    """Stop an item that no worker has acknowledged."""
    subject = await trial.claim_item()
    answer = await trial.api.stop(subject.id, json={"force": False})
    raise_clause_differs_unless(answer.ok, str(answer))
    state = await trial.read_item_state(subject)
    raise_clause_differs_unless(state == STOPPED, f"the item is {state}")


@clause("stop-repeat", "A stop of a stopped item: 200 (`qoder`) or 409 (`anthropic`).")
async def check_repeated_stop_is_answered(trial: ClauseTrial) -> None:
    """Stop an item twice, as a worker does after a lost answer."""
    subject = await trial.create_active_item()
    await trial.stop_item(subject, force=True)
    answer = await trial.api.stop(subject.id, json={"force": True})
    readable = answer.ok or is_conflict(answer) or answer.status == HTTPStatus.NOT_FOUND
    raise_clause_broken_unless(readable, f"{answer}: a worker takes the stop for refused")
    refused = (True, STOPPED) in DIALECTS[trial.api.dialect].stop_refused
    as_documented = is_conflict(answer) if refused else answer.status == HTTPStatus.OK
    raise_clause_differs_unless(as_documented, str(answer))


@clause("stop-body", "The body may be left out.")
async def check_stop_without_body_is_accepted(trial: ClauseTrial) -> None:
    """Send a stop request without a body, and check that it is accepted."""
    answer = await trial.api.stop((await trial.create_active_item()).id)
    raise_clause_differs_unless(answer.ok, str(answer))


@clause("stop-final", "A stopped item is never delivered again.")
async def check_stopped_item_is_never_delivered(trial: ClauseTrial) -> None:
    """Stop an item, and poll for longer than the redelivery window."""
    subject = await trial.create_active_item()
    await trial.stop_item(subject, force=True)
    again = await trial.wait_for_delivery(subject, WATCHED_SECONDS)
    raise_clause_broken_unless(again is None, "it is delivered: the session runs again")
