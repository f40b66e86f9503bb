"""Faults: immutable descriptions of failures that are injected into one call.

Two carriers inject a `Fault`: `http_faults` into the requests that reach a control plane, and
`local_client` into calls in one process. `fault_rules` decides which calls have a fault.
See workpool/docs/testing.md, "Faults and failing networks".
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import reduce
from typing import TYPE_CHECKING, Any, Final, Literal

import orjson

from workpool.server.api_errors import APIError
from workpool.wire.response import Response

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from workpool.server import ControlPlane

Op = Literal["poll", "ack", "heartbeat", "stop", "update", "get", "list", "stats", "session",
             "enqueue", "events", "send", "stream"]  # fmt: skip
NoAnswer = Literal["silence", "closed", "reset"]
"""Silence on an open connection, a connection that is closed, or one that is reset."""

_JSON: Final = {"Content-Type": "application/json"}
_HTML: Final = {"Content-Type": "text/html"}
_PAGE: Final = b"<html><body><h1>Bad gateway</h1></body></html>"


@dataclass(frozen=True, slots=True)
class Fault:
    """A fault that is injected into one call. The fault `Fault()` changes nothing.

    Attributes:
        wait: Seconds for which the call waits in the client, for a rate limit or a connection,
            before it is checked and sent. In an HTTP request, the seconds add to `request_delay`.
        request_delay: Seconds until the request arrives, even if the caller has given up.
        answer_delay: Seconds until the answer arrives.
        byte_seconds: Seconds for each byte of the answer.
        before: Called when the request arrives, with the id of its environment and the id of its
            item, or None for a call without an item.
        applied: Whether the control plane carries out the operation.
        answer: Replaces the control plane's answer: a status with the envelope of an error, the
            body of a 200, a function that returns the answer, or no answer. None keeps the answer.
        retry_after: The header `Retry-After` if `answer` is a status.
        rewrite: Changes the JSON of the control plane's answer, if the call succeeded.
    """

    wait: float = 0.0
    request_delay: float = 0.0
    answer_delay: float = 0.0
    byte_seconds: float = 0.0
    before: Callable[[str, str | None], None] | None = None
    applied: bool = True
    answer: int | bytes | Callable[[], Response] | NoAnswer | None = None
    retry_after: str | float | None = None
    rewrite: Callable[[Any], Any] | None = None

    def replace_answer(self, true: Response) -> Response | NoAnswer:
        """Return the answer that the client gets in place of the control plane's answer.

        The argument `true` is the control plane's answer.
        """
        match self.answer:
            case None if self.rewrite is not None and true.status in range(200, 300):
                body = true.body if isinstance(true.body, bytes) else b""
                return true._replace(body=orjson.dumps(self.rewrite(orjson.loads(body))))
            case None:
                return true
            case int(status):
                after = self.retry_after
                headers = _JSON if after is None else {**_JSON, "Retry-After": str(after)}
                return Response(
                    status, headers, orjson.dumps(APIError(status, "injected").to_envelope())
                )
            case bytes(body):
                return Response(200, _JSON, body)
            case str(nothing):
                return nothing
            case make:
                return make()


NO_FAULT: Final = Fault()


def combine_faults(faults: Sequence[Fault]) -> Fault:
    """Return one fault with the effects of several faults, as if they were nested middlewares.

    The first fault is the outermost: it receives the request first and changes the answer last.
    """
    return reduce(_combine_two_faults, faults, NO_FAULT) if len(faults) != 1 else faults[0]


def _combine_two_faults(outer: Fault, inner: Fault) -> Fault:
    if not outer.applied:
        # The request does not get past the outer fault, so the inner fault has no effect.
        return outer
    replaced = outer if outer.answer is not None else inner
    return Fault(
        wait=outer.wait + inner.wait,
        request_delay=outer.request_delay + inner.request_delay,
        answer_delay=outer.answer_delay + inner.answer_delay,
        byte_seconds=outer.byte_seconds + inner.byte_seconds,
        before=_combine_arrival_callbacks(outer.before, inner.before),
        applied=inner.applied,
        answer=replaced.answer,
        retry_after=replaced.retry_after,
        rewrite=_combine_answer_rewrites(outer.rewrite, inner.rewrite),
    )


def _combine_arrival_callbacks(
    outer: Callable[[str, str | None], None] | None,
    inner: Callable[[str, str | None], None] | None,
) -> Callable[[str, str | None], None] | None:
    if outer is None or inner is None:
        return outer or inner

    def call_outer_then_inner(environment_id: str, work_id: str | None) -> None:
        outer(environment_id, work_id)
        inner(environment_id, work_id)

    return call_outer_then_inner


def _combine_answer_rewrites(
    outer: Callable[[Any], Any] | None, inner: Callable[[Any], Any] | None
) -> Callable[[Any], Any] | None:
    if outer is None or inner is None:
        return outer or inner
    return lambda value: outer(inner(value))


def status(
    code: int, *, retry_after: str | float | None = None, html: bool = False, applied: bool = False
) -> Fault:
    """Return a fault that answers with the given status code.

    The body is a JSON error of the protocol, or with `html` the HTML page of a gateway.
    """
    if html:
        after = {} if retry_after is None else {"Retry-After": str(retry_after)}
        return literal(_PAGE, code, headers=_HTML | after, applied=applied)
    return Fault(answer=code, retry_after=retry_after, applied=applied)


def garbled(*, applied: bool = True) -> Fault:
    """Return a fault that answers with status 200 and a body that is not JSON."""
    return Fault(answer=b'{"id": "work_', applied=applied)


def literal(
    body: bytes | Callable[[], bytes],
    code: int = 200,
    *,
    headers: Mapping[str, str] | None = None,
    applied: bool = False,
) -> Fault:
    """Return a fault that answers with `body`, or with the result of `body` if it is callable."""

    def make_answer() -> Response:
        return Response(code, headers or _JSON, body() if callable(body) else body)

    return Fault(answer=make_answer, applied=applied)


def delay(seconds: float, *, applied: bool = False) -> Fault:
    """Return a fault that delays a call by `seconds`.

    The request is delayed, or, with `applied`, only the answer to the request.
    """
    return Fault(answer_delay=seconds) if applied else Fault(request_delay=seconds)


def silence(*, applied: bool = True) -> Fault:
    """Return a fault that sends no answer and leaves the connection open."""
    return Fault(answer="silence", applied=applied)


def lost(*, applied: bool = True) -> Fault:
    """Return a fault that loses the answer: the connection is closed instead."""
    return Fault(answer="closed", applied=applied)


def reset(*, applied: bool = True) -> Fault:
    """Return a fault that resets the connection instead of answering."""
    return Fault(answer="reset", applied=applied)


def trickle(seconds: float) -> Fault:
    """Return a fault that sends the answer byte by byte, with `seconds` between two bytes."""
    return Fault(byte_seconds=seconds)


def expired(plane: ControlPlane) -> Fault:
    """Return a fault that ends the lease of an item just before a call for this item."""

    def expire_item_lease(environment_id: str, work_id: str | None) -> None:
        if work_id is not None:
            expire_lease(plane, work_id, environment_id)

    return Fault(before=expire_item_lease)


def expire_lease(plane: ControlPlane, work_id: str, environment_id: str | None = None) -> None:
    """End the lease of an item now, as if its time had passed.

    The call has no effect on an item that has no lease.
    """
    queue = plane.operations.get_queue(environment_id or plane.environments[0])
    item = queue.get_item(work_id)
    if item.lease_end is not None:
        # End the lease at the time of the latest call, so that it has expired and its end becomes
        # the next record of the control plane's history, which is ordered by time.
        queue.put_item(
            replace(item, lease_end=min(item.lease_end, plane.operations.latest_call_time))
        )
        plane.operations.get_queue(queue.environment_id)
