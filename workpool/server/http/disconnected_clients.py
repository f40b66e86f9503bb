"""Detection of clients that have closed the connection of their request.

The event loop notices a closed connection only at its next call of `select`. Until then, a woken
poll could deliver an item to a client that has disconnected, so a poll asks the kernel itself.
"""

from __future__ import annotations

import select
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from aiohttp import web

_HANGUP: Final = getattr(select, "POLLRDHUP", 0)
"""The event of a closed connection on Linux; 0 elsewhere, where only the loop notices it."""


def has_disconnected(request: web.Request) -> bool:
    """Return whether the client has closed its connection. Never waits."""
    transport = request.transport
    if transport is None or transport.is_closing():
        return True
    connection = transport.get_extra_info("socket")
    if not _HANGUP or connection is None:
        return False
    poller = select.poll()
    poller.register(connection.fileno(), _HANGUP)
    return bool(poller.poll(0))
