"""Optional calls: a pool works without them if its credential does not permit them.

Some control planes do not let a worker's key read an item, write its metadata or query statistics.
Such a refusal is remembered as long as the process runs and logged once with its meaning; the call
is not sent again. See workpool/docs/architecture.md, "Optional calls".
"""

from __future__ import annotations

import asyncio
from contextlib import aclosing
from http import HTTPStatus
from typing import TYPE_CHECKING, Final, Literal, TypeVar

from workpool.errors import NotPermittedError, RefusedError, TransientError
from workpool.log_fields import pool_logger

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Mapping

    from workpool.errors import ControlPlaneError
    from workpool.pool.client_protocol import ClientProtocol
    from workpool.wire.items import WorkItem

log = pool_logger(__name__)
T = TypeVar("T")
Op = Literal["get", "update", "stats"]

DENIED: Final = frozenset({401, 403, 405, 501})
UNSUPPORTED: Final = "unsupported_capability"
"""The error type of one control plane's 400 for calls that it does not have."""
NOT_PERMITTED: Final = "the credential may not make this call"
MEANING: Final[Mapping[Op, str]] = {
    "get": "an item of unknown owner is looked up in the list of items",
    "update": "results and errors of sessions are not written, and attempts are counted in this"
    " process only",
    "stats": "the metrics of the remote queue are absent",
}
LOOK_UP_ITEMS: Final = 1000
"""Largest number of items that are listed to find one."""


class OptionalCalls:
    """Makes the optional calls of one pool, on any of its event loops.

    The pool works without these calls, and some credentials do not permit them. A refusal is
    remembered, so that calls which would be refused again are not sent.

    Attributes:
        refused: The calls that the credential is known not to permit, with the status of the
            refusal. Only this class changes it.
    """

    def __init__(self) -> None:
        self.refused: dict[Op, int | None] = {}
        self._allowed: set[Op] = set()
        self._logged: set[Op] = set()

    def check_permitted(self, op: Op) -> None:
        """Raise an error if the control plane has refused this kind of call before.

        Raises:
            NotPermittedError: The call was refused before.
        """
        if op in self.refused:
            raise NotPermittedError(op, self.refused[op], NOT_PERMITTED)

    async def send_optional_call(self, op: Op, call: Callable[[], Awaitable[T]]) -> T:
        """Make an optional call, unless the control plane has refused this kind of call before.

        Raises:
            NotPermittedError: The credential does not permit the call.
            ControlPlaneError: The error of the call.
        """
        self.check_permitted(op)
        try:
            value = await call()
        except (RefusedError, TransientError) as error:
            if not self._record_refusal(op, error):
                raise
            status = error.status
        else:
            self._allowed.add(op)
            return value
        raise NotPermittedError(op, status, NOT_PERMITTED)

    def forget_refusals(self) -> None:
        """Forget all refusals, so that every optional call is tried again.

        Called after the refusal of a call that every valid credential permits: the credential
        itself may have been invalid when the optional calls were refused.
        """
        self.refused.clear()

    def _record_refusal(self, op: Op, error: ControlPlaneError) -> bool:
        """Record the refusal if the error means that the credential never permits this call.

        Returns:
            Whether the refusal was recorded.
        """
        if op in self._allowed or not _is_permanent_refusal(op, error):
            return False
        self.refused[op] = error.status
        if op not in self._logged:
            self._logged.add(op)
            log.warning(
                "%s; the setting api_key can hold a credential that may make this call: %s",
                MEANING[op],
                error,
                extra={"error": str(error)},
            )
        return True


def _is_permanent_refusal(op: Op, error: ControlPlaneError) -> bool:
    status = error.status
    if op == "stats" and status == HTTPStatus.NOT_FOUND:
        return True
    return status in DENIED or error.error_type == UNSUPPORTED


async def read_or_find_item(
    client: ClientProtocol, optional: OptionalCalls, work_id: str, timeout: float
) -> WorkItem | None:
    """Read one item, or find it in the list of items if the credential cannot read single items.

    Args:
        client: Sends the calls.
        optional: The optional calls of the credential.
        work_id: The item.
        timeout: The limit in seconds of each of the two calls.

    Returns:
        The item; None if it is not among the first `LOOK_UP_ITEMS` of the list.
    """
    try:
        return await optional.send_optional_call(
            "get", lambda: client.get(work_id, timeout=timeout)
        )
    except NotPermittedError:
        pass
    try:
        async with (
            asyncio.timeout(timeout),
            aclosing(client.list(limit=LOOK_UP_ITEMS, timeout=timeout)) as items,
        ):
            async for item in items:
                if item.id == work_id:
                    return item
    except TimeoutError:
        raise TransientError("list", None, "no answer in time", reason="timeout") from None
    return None
