"""The check whether the client of a request still waits.

The loop notices a closed connection only at its next call of `select`; before that, a woken poll
could take an item for a client that has gone. So a poll asks the kernel itself.
"""

from __future__ import annotations

import select
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from aiohttp import web

_HANGUP: Final = getattr(select, "POLLRDHUP", 0)
"""Linux only; elsewhere a closed connection is noticed by the loop."""


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
