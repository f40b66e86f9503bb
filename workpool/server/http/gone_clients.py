"""Whether the client of a request is still there.

The loop learns of a hang-up only when it next asks the kernel, and by then a poll may have been
woken and have taken an item for nobody. So a poll asks the kernel itself.
"""

from __future__ import annotations

import select
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from aiohttp import web

_HANGUP: Final = getattr(select, "POLLRDHUP", 0)
"""Linux; elsewhere what the loop knows must do."""


def has_gone(request: web.Request) -> bool:
    """Whether the client has closed its connection. Never waits."""
    transport = request.transport
    if transport is None or transport.is_closing():
        return True
    connection = transport.get_extra_info("socket")
    if not _HANGUP or connection is None:
        return False
    poller = select.poll()
    poller.register(connection.fileno(), _HANGUP)
    return bool(poller.poll(0))
