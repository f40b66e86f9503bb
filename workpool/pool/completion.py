"""The end of a session: the completion table, and the requests that end a session.

The table defines the actions, and `Completion` carries them out. Nothing is sent for an item whose
lease is not held, and an item whose result could not be written is not stopped as completed. See
workpool/docs/architecture.md, "The end of a session".
"""

from __future__ import annotations

import asyncio
import contextlib
import math
from dataclasses import dataclass
from functools import partial
from http import HTTPStatus
from traceback import TracebackException
from typing import TYPE_CHECKING, Final, Literal

from workpool.errors import (
    ConflictError,
    ControlPlaneError,
    NotPermittedError,
    PreconditionError,
    RefusedError,
    SessionGoneError,
    SessionStalled,
    TransientError,
)
from workpool.events import ResultDropped, StopFinished
from workpool.log_fields import pool_logger
from workpool.pool.item_requests import SendOptions
from workpool.pool.pool_item import EndReason
from workpool.session import Outcome, PoolRelease, Release
from workpool.wire.http.call_options import Priority
from workpool.wire.protocol import OUR_ERROR

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from workpool.events import CallResult
    from workpool.pool.attempt_number import Patch
    from workpool.pool.item_requests import ItemSender
    from workpool.pool.lease import Lease
    from workpool.pool.pool_context import PoolContext
    from workpool.pool.pool_item import PoolItem
    from workpool.wire.http.call_options import CallOptions

log = pool_logger(__name__)

RELEASE_DELAY_SECONDS = 10.0
MARK_SECONDS = 1.5
"""Seconds for which a drain waits for a mark, at most twice.

The rest of its 5 s is for the release.
"""
MARK_TRY_SECONDS = 30.0
"""Seconds for which the write of a running session's mark is retried."""
NOTE_LIMIT = 512
"""Largest number of characters of `workpool.error` and `workpool.released`."""

DRAIN_REASON: Final = "the pool is draining"


@dataclass(frozen=True, slots=True)
class CompletionActions:
    """The actions at the end of a session, for one end reason.

    Attributes:
        item: The action on the item.
        metadata: The metadata to write.
        outcome: The outcome of the session if the requests succeed.
    """

    item: Literal["stop", "release", "untouched"]
    metadata: Literal["result", "error", "reason", "none"]
    outcome: Outcome


# The end reasons are sorted by severity. If a session has several of them, the row of the most
# severe one applies, which is the last of their rows.
TABLE: Final[Mapping[EndReason, CompletionActions]] = {
    EndReason.RETURNED: CompletionActions("stop", "result", "completed"),
    EndReason.RAISED: CompletionActions("stop", "error", "failed"),
    EndReason.TIMED_OUT: CompletionActions("stop", "error", "timed_out"),
    EndReason.STALLED: CompletionActions("stop", "error", "stalled"),
    EndReason.DRAINED: CompletionActions("release", "reason", "released"),
    EndReason.RELEASED: CompletionActions("release", "reason", "released"),
    EndReason.STOP_REQUESTED: CompletionActions("stop", "result", "stopped"),
    EndReason.HANDED_OFF: CompletionActions("untouched", "none", "detached"),
    EndReason.STOPPED: CompletionActions("untouched", "none", "stopped"),
    EndReason.LOST: CompletionActions("untouched", "none", "lease_lost"),
}

COMPLETION_OPTIONS: Final = SendOptions(Priority.COMPLETION, by_handler=False)


class Completion:
    """Sends the requests at the end of a session, as the completion table demands.

    Lives on the handlers' loop.
    """

    def __init__(self, context: PoolContext, sender: ItemSender) -> None:
        self._with_message = context.settings.report_errors == "message"
        self._client = context.client
        self._renewer = context.renewer
        self._clock = context.clock
        self._observe = context.observe
        self._sender = sender
        self._optional = context.optional

    async def complete_session(self, item: PoolItem) -> Outcome:
        """Write the metadata and stop or release the item, as the completion table demands.

        Returns:
            The outcome of the session.
        """
        row = find_completion_actions(item)
        if row.item == "untouched":
            return row.outcome
        try:
            if row.item == "release":
                return await self._release_item(item)
            outcome = await self._write_session_metadata(item, row)
            await self.stop_item(item, confirm=row.outcome == "stopped")
        except SessionGoneError:
            return "stopped" if item.lease.status == "stopped" else "lease_lost"
        except RefusedError as error:
            log.error(  # noqa: TRY400 - expected, no stack
                "completion refused: %s", error, extra={"work_id": item.id, "error": str(error)}
            )
            return "failed"
        except TransientError as error:
            # The item is not stopped, so the control plane delivers it to a worker again after the
            # end of the lease: the outcome is `released`.
            log.warning(
                "completion not written: %s", error, extra={"work_id": item.id, "error": str(error)}
            )
            return "released"
        return outcome

    async def stop_item(
        self, item: PoolItem, *, confirm: bool = False, seconds: float = math.inf
    ) -> None:
        """Stop the item. The request has `force`, so that it is allowed in every state.

        Raises:
            SessionGoneError: The lease is not held, and it is unknown whether the stop was applied.
            RefusedError, TransientError: The stop was refused, or may not have been applied.
        """
        lease = item.lease
        options = (
            COMPLETION_OPTIONS
            if seconds == math.inf
            else COMPLETION_OPTIONS._replace(seconds=seconds)
        )
        result: CallResult = "error"
        try:
            call = partial(self._send_stop, item)
            await self._sender.send_with_retries(item, call, options, lease.record_own_stop)
            result = "ok"
        except (ConflictError, PreconditionError):
            result = "conflict"  # The item is stopped already: do not repeat the stop.
        except SessionGoneError:
            if lease.status != "finished":
                raise
            result = "ok"
        except RefusedError as error:
            result = "gone" if error.status == HTTPStatus.NOT_FOUND else "error"
            raise
        finally:
            self._observe(StopFinished, item.work_item, "confirm" if confirm else "force", result)

    async def _send_stop(self, item: PoolItem, options: CallOptions, seconds: float) -> None:
        lease = item.lease
        before = lease.own_stop
        try:
            await self._client.stop(
                item.id, force=True, read_item=False, timeout=seconds, options=options
            )
        except (TransientError, RefusedError) as error:
            if isinstance(error, RefusedError) or not error.may_be_applied:
                # The stop was not applied. If the item is stopped later, another client stops it.
                lease.own_stop = before
            raise

    async def _write_session_metadata(self, item: PoolItem, row: CompletionActions) -> Outcome:
        """Write the metadata that a row of the completion table names; return the outcome.

        The outcome is that of the row, or `failed` if the control plane refuses the result.
        """
        attempt = item.attempt
        if row.metadata == "result" and not item.result:
            if patch := attempt.make_session_end_metadata({}):
                await self._delete_release_mark(item, patch)
            return row.outcome
        notes = item.result if row.metadata == "result" else self._make_error_metadata(item)
        try:
            await self.write_metadata(item, attempt.make_session_end_metadata(notes))
        except (ConflictError, PreconditionError):
            pass  # The item is stopped already, so its metadata cannot be written anymore.
        except NotPermittedError:
            # Complete the session without its result: another run could not write the result
            # either.
            if row.metadata == "result":
                self._observe(ResultDropped, item.work_item)
        except RefusedError as error:
            log.error(  # noqa: TRY400 - expected, no stack
                "metadata refused: %s", error, extra={"work_id": item.id, "error": str(error)}
            )
            if row.metadata != "result":
                return row.outcome
            # The control plane has refused the result, so the session has failed. Write this error
            # to the metadata instead of the result.
            item.error = error
            notes = self._make_error_metadata(item)
            with contextlib.suppress(RefusedError, ConflictError, PreconditionError):
                await self.write_metadata(item, attempt.make_session_end_metadata(notes))
            return "failed"
        return row.outcome

    async def _delete_release_mark(self, item: PoolItem, patch: Patch) -> None:
        """Delete the release mark that a drain has written, so that this run counts as an attempt.

        A failure is logged; it does not change the outcome of the session.
        """
        try:
            await self.write_metadata(
                item, patch, COMPLETION_OPTIONS._replace(seconds=MARK_SECONDS)
            )
        except NotPermittedError:
            pass  # The pool may not write metadata, so it has written no mark to delete.
        except ControlPlaneError as error:
            log.warning(
                "mark not removed: %s", error, extra={"work_id": item.id, "error": str(error)}
            )

    async def mark_running_session_as_no_attempt(self, item: PoolItem) -> None:
        """At the beginning of a drain, write the release mark of a running session.

        Without this mark, the run would count as an attempt if the process ended before the
        session did. The write is cancelled once the session ends.
        """
        if item.lease.stop_requested:
            # No worker runs this item again, so the number of its attempts does not matter.
            return
        # When a drain begins, every session sends this write. Its priority is low, so that
        # completions do not wait for all these writes.
        options = SendOptions(Priority.HANDLER, by_handler=False, seconds=MARK_TRY_SECONDS)
        await self._write_release_mark(item, DRAIN_REASON, options)

    async def mark_released_session_as_no_attempt(
        self, item: PoolItem, reason: str, seconds: float
    ) -> None:
        """Write the release mark of a released session, whose run then does not count.

        The write takes `seconds` at most. Writes nothing if another process may own the item.
        """
        lease = item.lease
        if lease.unsettled or (item.parents_heartbeat is not None and not lease.begun):
            # Before the first successful heartbeat another process may own the item: write nothing.
            return
        await self._write_release_mark(item, reason, COMPLETION_OPTIONS._replace(seconds=seconds))

    async def _write_release_mark(self, item: PoolItem, reason: str, options: SendOptions) -> None:
        attempt = item.attempt
        retry = 0 if item.session is None else item.session.retry
        try:
            await self.write_metadata(item, attempt.make_release_metadata(reason, retry), options)
            attempt.marked = True
        except NotPermittedError:
            # The pool may not write metadata: `LocalRunCounter` counts the runs in this process.
            pass
        except (ControlPlaneError, SessionGoneError) as error:
            log.warning(
                "mark not written: %s", error, extra={"work_id": item.id, "error": str(error)}
            )

    async def write_metadata(
        self,
        item: PoolItem,
        patch: Mapping[str, str | None],
        options: SendOptions = COMPLETION_OPTIONS,
    ) -> None:
        """Write metadata of the item; retry while the lease is held, for `options.seconds` at most.

        Raises:
            NotPermittedError: The credential may not write metadata.
            SessionGoneError, ControlPlaneError: The metadata was not written.
        """
        await self._optional.send_optional_call(
            "update",
            lambda: self._sender.send_with_retries(
                item,
                lambda call_options, timeout: self._client.update_metadata(
                    item.id, patch, timeout=timeout, options=call_options
                ),
                options,
                # Check the permission again right before sending: while this write waited for a
                # connection, the control plane may have refused another write.
                partial(self._optional.check_permitted, "update"),
            ),
        )

    async def _release_item(self, item: PoolItem) -> Outcome:
        lease, attempt = item.lease, item.attempt
        release = item.error if isinstance(item.error, Release) else PoolRelease(DRAIN_REASON)
        if release is item.error or (lease.status == "held" and not attempt.marked):
            draining = item.session is not None and item.session.draining
            hurried = draining or item.handler_task is None
            await self.mark_released_session_as_no_attempt(
                item,
                self._format_release_reason(release),
                MARK_SECONDS if hurried else MARK_TRY_SECONDS,
            )
        self._renewer.request_last_heartbeat(lease, read_release_delay_seconds(release))
        await item.wait_until(
            lambda: lease.status != "held", lease.remaining_seconds(self._clock())
        )
        return "lease_lost" if lease.is_loss_confirmed else find_outcome_of_expired_lease(lease)

    def _format_release_reason(self, release: Release) -> str:
        if self._with_message or isinstance(release, PoolRelease):
            return make_metadata_text(str_without_raising(release.reason))
        return make_metadata_text(type(release).__name__)

    def _make_error_metadata(self, item: PoolItem) -> Mapping[str, str]:
        error = item.error or _make_error_for_reason(item.end_reason)
        text = type(error).__name__
        if self._with_message and (message := str_without_raising(error)):
            text = f"{text}: {message}"
        return {OUR_ERROR: make_metadata_text(text)}


def _make_error_for_reason(reason: EndReason | None) -> Exception:
    """Return the error for the metadata of a session that a time limit has ended."""
    if reason is EndReason.STALLED:
        return SessionStalled("no progress for stall_timeout seconds")
    return TimeoutError("the session's time is over")


def find_completion_actions(item: PoolItem) -> CompletionActions:
    """Return the row of the completion table for the item's most severe end reason."""
    if item.end_reason is None:
        raise RuntimeError(f"{item.id}: nothing ends this session")
    return TABLE[item.end_reason]


def predict_session_outcome(item: PoolItem, error: BaseException | None, now: float) -> Outcome:
    """Return the outcome that a session will have if its completion succeeds.

    Args:
        item: The item.
        error: The handler's error; None: the handler returned a result that can be written.
        now: The time on the lease clock.
    """
    if error is None:
        reason = EndReason.RETURNED
    elif find_release_exception(error) is not None:
        reason = EndReason.RELEASED
    elif isinstance(error, asyncio.CancelledError) and item.cancelled_for is not None:
        reason = item.cancelled_for
    else:
        reason = EndReason.RAISED
    reasons = (reason, item.end_reason, item.find_end_reason_of_lease(now))
    return TABLE[max(each for each in reasons if each is not None)].outcome


def find_outcome_of_abandoned_session(item: PoolItem) -> Outcome:
    """Return the outcome of an abandoned session, by the status of its lease."""
    lease = item.lease
    match lease.status:
        case "finished":
            return find_completion_actions(item).outcome
        case "lost":
            return "lease_lost"
    return find_outcome_of_expired_lease(lease)


def find_outcome_of_expired_lease(lease: Lease) -> Outcome:
    """Return the outcome of a session whose lease gets no further heartbeat and will expire.

    At the end of the lease, the control plane stops the item if a stop was requested; otherwise it
    delivers the item again.
    """
    if lease.status == "handed_off":
        return "detached"
    return "stopped" if lease.status == "stopped" or lease.stop_requested else "released"


def iterate_errors_in_group(error: BaseException) -> Iterator[BaseException]:
    """Yield the errors inside an exception group, at any depth, or a plain error itself."""
    unread = [error]
    # Use a loop: a recursive function would reach the recursion limit in an exception group that is
    # nested deeply.
    while unread:
        each = unread.pop()
        if isinstance(each, BaseExceptionGroup):
            unread.extend(each.exceptions)
        else:
            yield each


def find_release_exception(error: BaseException) -> Release | None:
    """Return the `Release` that a handler raised, alone or in an exception group.

    None if the error is or contains anything else. Of several releases in a group, the one with
    the longest delay is returned.
    """
    releases: list[Release] = []
    for each in iterate_errors_in_group(error):
        if not isinstance(each, Release):
            return None
        releases.append(each)
    return max(releases, key=read_release_delay_seconds, default=None)


def read_release_delay_seconds(release: Release) -> float:
    """Return the seconds after which another worker may take a released item.

    `RELEASE_DELAY_SECONDS` if the handler's `Release` has no number.
    """
    delay: object = release.delay
    if isinstance(delay, int | float) and not math.isnan(delay):
        return delay
    log.error("release delay is no number", extra={"type": type(delay).__name__})
    return RELEASE_DELAY_SECONDS


def str_without_raising(value: object) -> str:
    """Return an error or a reason as text, even if its `__str__` raises."""
    error = value if isinstance(value, BaseException) else Exception(value)
    return str(TracebackException(type(error), error, None))


def make_metadata_text(text: str) -> str:
    """Return `text` in a form that metadata accept.

    Text longer than `NOTE_LIMIT` is cut, and lone surrogates are replaced.
    """
    return text[:NOTE_LIMIT].encode(errors="replace").decode()
