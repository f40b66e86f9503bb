"""The calls that a worker's credential may not be allowed to make.

Some control planes refuse a worker's key the calls that read an item, write its metadata or query
statistics. A pool works without them. Such a refusal is learnt once, for as long as the process
runs, and logged once with what it means; the call is not sent again.
See workpool/docs/architecture.md, "Optional calls". May be used on any thread.
"""

from __future__ import annotations

import asyncio
import logging
from contextlib import aclosing
from http import HTTPStatus
from typing import TYPE_CHECKING, Final, Literal, TypeVar

from workpool.errors import NotPermittedError, RefusedError, TransientError

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Mapping

    from workpool.errors import ControlPlaneError
    from workpool.pool.client_protocol import ClientProtocol
    from workpool.wire.items import WorkItem

log = logging.getLogger(__name__)

T = TypeVar("T")
Op = Literal["get", "update", "stats"]

DENIED: Final = frozenset({401, 403, 405, 501})
UNSUPPORTED: Final = "unsupported_capability"
"""The error type with which one control plane answers 400 to calls that it does not have."""
NOT_PERMITTED: Final = "the credential may not make this call"
MEANING: Final[Mapping[Op, str]] = {
    "get": "an item in doubt is looked up in the list of items",
    "update": "results and errors of sessions are not written, and attempts are counted in this"
    " process only",
    "stats": "the metrics of the remote queue are absent",
}
LOOK_UP_ITEMS: Final = 1000
"""At most so many items are listed to find one."""


class OptionalCalls:
    """Makes optional calls for one pool, on all of its loops.

    Attributes:
        refused: The calls that the credential may not make, as far as that is known, with the
            status of the refusal. Changed only here.
    """

    def __init__(self) -> None:
        self.refused: dict[Op, int | None] = {}
        self._allowed: set[Op] = set()
        self._logged: set[Op] = set()

    def check(self, op: Op) -> None:
        """Raise unless the call may be made, as far as that is known.

        Raises:
            NotPermittedError: It was refused before.
        """
        if op in self.refused:
            raise NotPermittedError(op, self.refused[op], NOT_PERMITTED)

    async def make(self, op: Op, call: Callable[[], Awaitable[T]]) -> T:
        """Make a call, unless it was refused before.

        Raises:
            NotPermittedError: The credential may not make it.
            ControlPlaneError: As the call raises it.
        """
        self.check(op)
        try:
            value = await call()
        except (RefusedError, TransientError) as error:
            if not self._learn(op, error):
                raise
            status = error.status
        else:
            self._allowed.add(op)
            return value
        raise NotPermittedError(op, status, NOT_PERMITTED)

    def forget(self) -> None:
        """Let all calls be tried again: a call that every credential may make was refused too."""
        self.refused.clear()

    def _learn(self, op: Op, error: ControlPlaneError) -> bool:
        """Return whether a refusal means that the credential may not make this call at all."""
        if op in self._allowed or not _means_never(op, error):
            return False
        self.refused[op] = error.status
        if op not in self._logged:
            self._logged.add(op)
            log.warning(
                "call not permitted error=%s: %s; the setting api_key can hold a credential that"
                " may make it",
                error,
                MEANING[op],
            )
        return True


def _means_never(op: Op, error: ControlPlaneError) -> bool:
    status = error.status
    if op == "stats" and status == HTTPStatus.NOT_FOUND:
        return True  # a path that the control plane does not have
    return status in DENIED or error.error_type == UNSUPPORTED


async def read_item(
    client: ClientProtocol, optional: OptionalCalls, work_id: str, timeout: float
) -> WorkItem | None:
    """Read an item, or look it up in the list if the credential may not read it.

    Args:
        client: Sends the calls.
        optional: What the credential may do.
        work_id: The item.
        timeout: Seconds to read it, and to look it up.

    Returns:
        The item; None if it is not among the first `LOOK_UP_ITEMS` of the list.
    """
    try:
        return await optional.make("get", lambda: client.get(work_id, timeout=timeout))
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
