"""How a session ends: the finish table of design §1, as code, and what it makes us send.

The table decides; `finish` only carries it out. Nothing is sent for an item whose lease is not
held, and what could not be written is never taken for written.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass
from http import HTTPStatus
from traceback import TracebackException
from typing import TYPE_CHECKING, Final, Literal

from workpool.errors import (
    ConflictError,
    ControlPlaneError,
    PreconditionError,
    RefusedError,
    SessionGoneError,
    TransientError,
)
from workpool.events import StopFinished
from workpool.pool.attempt import ERROR
from workpool.pool.claim import UPDATE_SECONDS, Cause, Claim
from workpool.session import Outcome, Release

if TYPE_CHECKING:
    from workpool.events import CallResult
    from workpool.pool.parts import Parts

log = logging.getLogger(__name__)

FINISH_SECONDS = 10.0
MARK_SECONDS = 1.5
"""How long a drain waits for a mark, twice at most: what is left of its 5 s is for the release."""
RELEASE_DELAY_SECONDS = 10.0
NOTE_LIMIT = 512
"""Characters of `workpool.error` and `workpool.released`."""

DRAIN_REASON: Final = "the pool is draining"


@dataclass(frozen=True, slots=True)
class Row:
    """One row of the table: what is done with the item, what is written, what it counts as."""

    item: Literal["stop", "release", "untouched"]
    metadata: Literal["mapping", "error", "reason", "none"]
    outcome: Outcome


TABLE: Final[Mapping[Cause, Row]] = {  # when several apply, the lowest wins
    Cause.RETURNED: Row("stop", "mapping", "completed"),
    Cause.RAISED: Row("stop", "error", "failed"),
    Cause.TIMED_OUT: Row("stop", "error", "timed_out"),
    Cause.DRAINED: Row("release", "reason", "released"),
    Cause.RELEASED: Row("release", "reason", "released"),
    Cause.STOP_REQUESTED: Row("stop", "mapping", "stopped"),
    Cause.DETACHED: Row("untouched", "none", "detached"),
    Cause.STOPPED: Row("untouched", "none", "stopped"),
    Cause.LOST: Row("untouched", "none", "lease_lost"),
}


def mapping_of(returned: object) -> Mapping[str, str]:
    """What a handler returned, as metadata, copied; None counts as an empty mapping.

    A copy, because the handler may share its mapping with others who go on changing it.

    Raises:
        TypeError: It is neither None nor a mapping of strings that can be sent.
    """
    if returned is None:
        return {}
    if not isinstance(returned, Mapping):
        raise TypeError(
            f"a handler returns None or a mapping of strings, not {type(returned).__name__}"
        )
    result = dict(returned.items())
    for text in (text for pair in result.items() for text in pair):
        if not isinstance(text, str):
            raise TypeError(
                f"a handler returns a mapping of strings; this one holds {type(text).__name__}"
            )
        text.encode()  # a lone surrogate cannot be sent: UnicodeEncodeError, a ValueError
    return result


class Finisher:
    """Carries the table out. Lives on the handlers' loop."""

    def __init__(self, parts: Parts) -> None:
        self._with_message = parts.settings.report_errors == "message"
        self._calls = parts.calls
        self._keeper = parts.keeper
        self._observe = parts.observe

    async def finish(self, claim: Claim) -> Outcome:
        """Do what the row says, within `FINISH_SECONDS`, and return what it came to."""
        row = TABLE[max(claim.causes)]
        until = asyncio.get_running_loop().time() + FINISH_SECONDS
        if row.item == "untouched":
            return row.outcome
        try:
            if row.item == "release":
                return await self._release(claim, until)
            outcome = await self._write(claim, row, until)
            await self.stop(claim, until, confirm=row.outcome == "stopped")
        except SessionGoneError:
            return "stopped" if claim.lease.fate == "stopped" else "lease_lost"
        except RefusedError as error:
            log.error("finish refused work_id=%s error=%s", claim.item.id, error)  # noqa: TRY400 - expected, no stack
            return "failed"
        except TransientError as error:
            # Not stopped, so it is redelivered once its lease has lapsed: nothing is lost.
            log.warning("finish not written work_id=%s error=%s", claim.item.id, error)
            return "released"
        return outcome

    async def stop(self, claim: Claim, until: float, *, confirm: bool = False) -> None:
        """Stop the item with force: right in every state and in both dialects (protocol §3.4).

        Raises:
            SessionGoneError: The lease is not held, and our stop is not known to be applied.
            RefusedError, TransientError: It was not applied, as far as known.
        """
        result: CallResult = "error"
        try:
            await claim.send(lambda: self._send_stop(claim), until, claim.check_lease)
            result = "ok"
        except (ConflictError, PreconditionError):
            result = "conflict"  # it is stopped, which is all that we wanted
        except SessionGoneError:
            if claim.lease.fate != "finished":
                raise
            result = "ok"
        except RefusedError as error:
            result = "gone" if error.status == HTTPStatus.NOT_FOUND else "error"
            raise
        finally:
            self._observe(StopFinished(claim.item, "confirm" if confirm else "force", result))

    async def _send_stop(self, claim: Claim) -> None:
        lease = claim.lease
        before, lease.own_stop = lease.own_stop, True  # if it is read as stopped, this did it
        try:
            await self._calls.stop(claim.item.id, force=True)
        except (TransientError, RefusedError) as error:
            if isinstance(error, RefusedError) or error.reason == "throttled":
                lease.own_stop = before  # certainly not applied: whatever stops it is not ours
            raise

    async def mark_running(self, claim: Claim) -> None:
        """Mark a session that a drain interrupts; its end cancels this."""
        if not claim.lease.stop_requested:  # else nobody runs it again
            with contextlib.suppress(SessionGoneError):
                await self.mark(claim, DRAIN_REASON, UPDATE_SECONDS)

    async def mark(self, claim: Claim, reason: str, seconds: float) -> None:
        """Mark a session that is being released, within `seconds`; unmarked, its run counts.

        Raises:
            SessionGoneError: The lease is not held.
        """
        if claim.parents_beat is not None and not claim.lease.begun:
            return  # until its first beat has succeeded, the item may be its parent's
        until = asyncio.get_running_loop().time() + seconds
        try:
            await claim.write_metadata(claim.attempt.mark(reason), until)
            claim.attempt.marked = True
        except ControlPlaneError as error:
            log.warning("mark not written work_id=%s error=%s", claim.item.id, error)

    async def _write(self, claim: Claim, row: Row, until: float) -> Outcome:
        """Write the row's metadata, if any; return the outcome that is left."""
        if row.metadata == "mapping" and not claim.result:
            await self._unmark(claim)
            return row.outcome
        notes = claim.result if row.metadata == "mapping" else self._error_note(claim)
        try:
            await claim.write_metadata(claim.attempt.closing(notes), until)
        except (ConflictError, PreconditionError):
            pass  # already stopped: fine
        except RefusedError as error:
            log.error("metadata refused work_id=%s error=%s", claim.item.id, error)  # noqa: TRY400 - expected, no stack
            if row.metadata != "mapping":
                return row.outcome
            # A result that cannot be written must not count as done.
            claim.error = error
            notes = self._error_note(claim)
            with contextlib.suppress(RefusedError, ConflictError, PreconditionError):
                await claim.write_metadata(claim.attempt.closing(notes), until)
            return "failed"
        return row.outcome

    async def _unmark(self, claim: Claim) -> None:
        """Delete the mark of a session that has completed; one that stays must not run it again."""
        if patch := claim.attempt.closing({}):
            until = asyncio.get_running_loop().time() + MARK_SECONDS
            try:
                await claim.write_metadata(patch, until)
            except ControlPlaneError as error:
                log.warning("mark not deleted work_id=%s error=%s", claim.item.id, error)

    async def _release(self, claim: Claim, until: float) -> Outcome:
        now = asyncio.get_running_loop().time
        drained = not isinstance(claim.error, Release)
        release = claim.error if isinstance(claim.error, Release) else Release(DRAIN_REASON)
        if not drained or (claim.lease.fate == "held" and not claim.attempt.marked):
            hurried = claim.session.draining or claim.running is None
            seconds = MARK_SECONDS if hurried else (until - now()) / 2
            await self.mark(claim, sendable(text_of(release.reason)), seconds)
        self._keeper.release(claim.lease, delay_of(release))
        await claim.until(lambda: claim.lease.fate != "held", max(0.0, until - now()))
        if claim.lease.confirmed:
            return "lease_lost"
        return _lapsed(claim)

    def _error_note(self, claim: Claim) -> Mapping[str, str]:
        error = claim.error or TimeoutError("the session's time is over")
        text = type(error).__name__
        if self._with_message and (message := text_of(error)):
            text = f"{text}: {message}"
        return {ERROR: sendable(text)}


def cut_short(claim: Claim) -> Outcome:
    """What a session comes to whose end a drain does not wait for: what its lease came to."""
    match claim.lease.fate:
        case "finished":
            return TABLE[max(claim.causes)].outcome
        case "lost":
            return "lease_lost"
    return _lapsed(claim)


def _lapsed(claim: Claim) -> Outcome:
    """An item that is stopping when its lease lapses is stopped: nobody gets it any more."""
    if claim.lease.fate == "detached":
        return "detached"
    return "stopped" if claim.lease.fate == "stopped" or claim.lease.stop_requested else "released"


def release_of(error: BaseException) -> Release | None:
    """Return the release that `error` is, or the longest one of a group of nothing but releases."""
    releases: list[Release] = []
    unread = [error]
    while unread:  # not recursive: a handler's groups may be nested deeper than the stack
        each = unread.pop()
        if isinstance(each, BaseExceptionGroup):
            unread.extend(each.exceptions)
        elif isinstance(each, Release):
            releases.append(each)
        else:
            return None
    return max(releases, key=delay_of, default=None)


def delay_of(release: Release) -> float:
    """Seconds until a released item may be taken; the usual ones when it says no number."""
    delay: object = release.delay
    if isinstance(delay, int | float) and not math.isnan(delay):
        return delay
    log.error("release delay is no number; type=%s", type(delay).__name__)
    return RELEASE_DELAY_SECONDS


def text_of(told: object) -> str:
    """What a handler raised or gave as a reason, as text, even if its `__str__` raises."""
    error = told if isinstance(told, BaseException) else Exception(told)
    return str(TracebackException(type(error), error, None))


def sendable(text: str) -> str:
    """`text`, cut to what a note may hold, and without what UTF-8 cannot carry."""
    return text[:NOTE_LIMIT].encode(errors="replace").decode()
