"""The slots that a handler may use: at most `max_sessions`, and none reserved for another handler.

Decides nothing about items: it counts those that the pool owns. Used on the handlers' loop only.
See workpool/docs/routing.md, "Limits of handlers".
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from workpool.errors import PluginError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from workpool.handlers import Handler
    from workpool.pool.pool_item import OwnedItems


class HandlerSlots:
    """The slots of the handlers of one pool.

    Args:
        items: The items that the pool owns.
        handlers: The handlers that are known before the first item.
        concurrency: The number of slots of the pool.

    Raises:
        PluginError: More slots are reserved than there are, or a handler would never have one.
    """

    def __init__(self, items: OwnedItems, handlers: Sequence[Handler], concurrency: int) -> None:
        self._items = items
        self._concurrency = concurrency
        self._reserving = [each for each in handlers if each.reserved_sessions]
        reserved = sum(each.reserved_sessions for each in self._reserving)
        if reserved > concurrency:
            names = ", ".join(f"{each.name} {each.reserved_sessions}" for each in self._reserving)
            raise PluginError(
                self._reserving[0].plugin,
                f"reserved_sessions are {reserved} in all ({names}), and concurrency is "
                f"{concurrency}: reserve less, or raise concurrency",
            )
        for each in handlers:
            if reserved == concurrency and not each.reserved_sessions:
                raise PluginError(
                    each.plugin,
                    f"{each.name} would never run: all {concurrency} slots are reserved for other "
                    "handlers; reserve less, or raise concurrency",
                )

    def free(self, handler: Handler) -> bool:
        """Return whether one more session of this handler may run."""
        limit = handler.max_sessions
        if limit is not None and self._items.count(handler) >= limit:
            return False
        if not self._reserving:
            return True
        kept_free = sum(
            max(0, other.reserved_sessions - self._items.count(other))
            for other in self._reserving
            if other.name != handler.name
        )
        return len(self._items) + kept_free < self._concurrency
