"""Limits for reading a list page by page: request rate, memory, and detection of endless lists."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Final

from workpool.errors import TransientError

if TYPE_CHECKING:
    from collections.abc import Iterable

PAGES_PER_SECOND: Final = 20
STALE_PAGES: Final = 100
"""After this many pages in a row without a new entry, the list counts as broken."""
REMEMBERED_IDS: Final = 10_000
REMEMBERED_TOKENS: Final = 1_000


class BoundedIdSet:
    """A set of at most `limit` ids; adding one more removes the id that was added first.

    Attributes:
        forgot: Whether the limit was exceeded, so that older ids are not known anymore.
    """

    def __init__(self, limit: int) -> None:
        self.forgot = False
        self._limit = limit
        self._ids: dict[str, None] = {}

    def __contains__(self, one: str) -> bool:
        return one in self._ids

    def add_id(self, one: str) -> bool:
        """Add an id; return whether it is new to the set."""
        if one in self._ids:
            return False
        self._ids[one] = None
        if len(self._ids) > self._limit:
            self.forgot = True
            del self._ids[next(iter(self._ids))]
        return True


class PageLimits:
    """Limits the rate of page requests for one list, and detects a list without an end.

    Args:
        op: The name of the call in errors.
    """

    def __init__(self, op: str) -> None:
        self._op = op
        self._next_at = 0.0  # the earliest time of the next request, on the clock of the event loop
        self._stale = 0
        self._ids = BoundedIdSet(REMEMBERED_IDS)
        self._tokens = BoundedIdSet(REMEMBERED_TOKENS)

    async def wait_before_next_page(self) -> None:
        """Wait until the rate limit allows the request for the next page."""
        loop = asyncio.get_running_loop()
        if self._next_at > (now := loop.time()):
            await asyncio.sleep(self._next_at - now)
        self._next_at = loop.time() + 1 / PAGES_PER_SECOND

    def record_page_entries(self, ids: Iterable[str], next_page: str | None) -> None:
        """Record the ids on a page and the token of the next page, to detect an endless list.

        Raises:
            TransientError: The list has no end.
        """
        new = [self._ids.add_id(one) for one in ids]
        self._stale = 0 if any(new) else self._stale + 1
        if next_page is None:
            return
        if not self._tokens.add_id(next_page):
            raise TransientError(self._op, None, "the pages repeat", reason="bad_body")
        if self._stale >= STALE_PAGES:
            problem = f"{STALE_PAGES} pages without anything new"
            raise TransientError(self._op, None, problem, reason="bad_body")
