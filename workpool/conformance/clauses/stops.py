"""Stopping an item.

See workpool/docs/protocol.md, "Stop".
"""

from __future__ import annotations

from http import HTTPStatus
from typing import TYPE_CHECKING, Final

from workpool.conformance.clause import clause
from workpool.conformance.trial import is_conflict
from workpool.conformance.verdict import same_or_breaks, same_or_differs
from workpool.server.http.server_dialects import DIALECTS
from workpool.wire.protocol import STOPPED, STOPPING

if TYPE_CHECKING:
    from workpool.conformance.trial import Trial

WATCHED_SECONDS: Final = 8.0


@clause("stop-force", "`force` ends an item at once.")
async def forced_stop(trial: Trial) -> None:
    """Stop an item with force, as a worker does at the end of a session."""
    subject = await trial.active()
    answer = await trial.api.stop(subject.id, json={"force": True})
    same_or_breaks(answer.ok, str(answer))
    state = await trial.state(subject)
    same_or_differs(state == STOPPED, f"the item is {state}")
    item = DIALECTS[trial.api.dialect].stop_answers_item
    as_documented = (
        answer.get("id") == subject.id if item else answer.status == HTTPStatus.NO_CONTENT
    )
    form = "without the item" if item else "with a body"
    same_or_differs(as_documented, f"HTTP {answer.status} {form}")


@clause("stop-graceful", "Without `force` an `active` item becomes `stopping`.")
async def graceful_stop(trial: Trial) -> None:
    """Stop an item gracefully, as an operator does."""
    subject = await trial.active()
    answer = await trial.api.stop(subject.id, json={"force": False})
    same_or_breaks(answer.ok, str(answer))
    state = await trial.state(subject)
    same_or_differs(state == STOPPING, f"the item is {state}")


@clause("stop-confirm", "A second graceful stop ends it (`qoder`) or is a 409 (`anthropic`).")
async def confirmed_stop(trial: Trial) -> None:
    """Confirm a graceful stop."""
    subject = await trial.active()
    await trial.stop(subject, force=False)
    answer = await trial.api.stop(subject.id, json={"force": False})
    if (False, STOPPING) not in DIALECTS[trial.api.dialect].stop_refused:
        state = await trial.state(subject)
        same_or_differs(answer.ok and state == STOPPED, f"{answer}, the item is {state}")
    else:
        same_or_differs(is_conflict(answer), str(answer))


@clause("stop-queued", "A `queued` item becomes `stopped`.")
async def stop_of_a_queued_item(trial: Trial) -> None:
    """Stop an item that no worker has acknowledged."""
    subject = await trial.claim()
    answer = await trial.api.stop(subject.id, json={"force": False})
    same_or_differs(answer.ok, str(answer))
    state = await trial.state(subject)
    same_or_differs(state == STOPPED, f"the item is {state}")


@clause("stop-repeat", "A stop of a stopped item: 200 (`qoder`) or 409 (`anthropic`).")
async def repeated_stop(trial: Trial) -> None:
    """Stop an item twice, as a worker does after a lost answer."""
    subject = await trial.active()
    await trial.stop(subject, force=True)
    answer = await trial.api.stop(subject.id, json={"force": True})
    readable = answer.ok or is_conflict(answer) or answer.status == HTTPStatus.NOT_FOUND
    same_or_breaks(readable, f"{answer}: a worker takes the stop for refused")
    refused = (True, STOPPED) in DIALECTS[trial.api.dialect].stop_refused
    as_documented = is_conflict(answer) if refused else answer.status == HTTPStatus.OK
    same_or_differs(as_documented, str(answer))


@clause("stop-body", "The body may be left out.")
async def stop_without_a_body(trial: Trial) -> None:
    """Stop an item without a body. A worker always sends one."""
    answer = await trial.api.stop((await trial.active()).id)
    same_or_differs(answer.ok, str(answer))


@clause("stop-final", "A stopped item is never delivered again.")
async def stopped_item_stays_stopped(trial: Trial) -> None:
    """Poll for longer than the redelivery window."""
    subject = await trial.active()
    await trial.stop(subject, force=True)
    again = await trial.delivery(subject, WATCHED_SECONDS)
    same_or_breaks(again is None, "it is delivered: the session runs again")
